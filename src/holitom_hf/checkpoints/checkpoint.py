"""What a checkpoint is: weights and settings, or settings alone that name where the weights come from."""

import copy
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import ClassVar

from huggingface_hub import HfApi
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..merging.package import of_package
from .model_card import model_card
from .writing import is_local, written_aside


logger = logging.get_logger(__name__)

READS = "reads checkpoints of LLaVA's authors"
load_original = of_package("models.original.loading", "load_original", READS)

# Keyword arguments that say where and how to download, for a base model as for the checkpoint itself.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")


class HoliTomCheckpointMixin:
    """
    `from_pretrained`, `save_pretrained` and `push_to_hub` of models, with config-only checkpoints.

    Attributes:
        save_options: What `save_pretrained` passes on where it is not told otherwise.
    """

    save_options: ClassVar[dict] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        Overrides PreTrainedModel.from_pretrained: also takes any upstream checkpoint of the backbone, and
        checkpoints without weights, whose weights come from the base model that they name.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository, ours or upstream's.
            config: A configuration of ours in place of the checkpoint's.
            kwargs: As upstream; `holitom_config` (a [`HoliTomConfig`], a preset's name or a path) replaces the
                checkpoint's settings, a dictionary those of its fields.

        Raises:
            OSError: If the checkpoint, or the base model it names, can't be found or read.
            ValueError: If the base model has another architecture.
        """
        if pretrained_model_name_or_path is None:  # weights from `state_dict`
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        if isinstance(config, PreTrainedConfig) and "holitom_config" in kwargs:
            config = copy.deepcopy(config)
            config.holitom_config = kwargs.pop("holitom_config")
        # From the file, since settings that replace the checkpoint's say nothing of its weights.
        base, revision = base_model_of(pretrained_model_name_or_path, kwargs)
        if base is None or _same_place(base, pretrained_model_name_or_path):
            return load_as_it_is(
                super().from_pretrained, pretrained_model_name_or_path, *model_args, config=config, **kwargs
            )

        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        own = {name: kwargs.pop(name) for name in ("revision", "subfolder", "holitom_config") if name in kwargs}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **own, **hub_kwargs)
        for name in ("code_revision", "_from_auto", "adapter_kwargs"):
            kwargs.pop(name, None)
        _check_base(config, base, revision or "main", pretrained_model_name_or_path, hub_kwargs)
        config.holitom_config = {"base_model_name_or_path": base, "base_model_revision": revision}
        # This class reads the weights: whatever code the base repository carries is never run.
        kwargs["trust_remote_code"] = False
        kwargs |= {"config": config, "revision": revision or "main"}
        return load_as_it_is(super().from_pretrained, base, *model_args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, config_only: bool = False, **kwargs):
        """
        Overrides PreTrainedModel.save_pretrained: the code that the checkpoint runs is written, too.

        Args:
            save_directory: Folder to write to.
            config_only: Write settings, code, a processor file and a model card, but no weights: `from_pretrained`
                takes them from `holitom_config.base_model_name_or_path`, or where this model was loaded from.
            args, kwargs: As upstream.

        Raises:
            ValueError: With `config_only`, if no base model is known.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; save_pretrained needs a folder")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        settings = self.config.holitom_config
        base = (settings.base_model_name_or_path, settings.base_model_revision)
        if config_only:
            return self._save_config_only(save_directory, base, **kwargs)
        settings.base_model_name_or_path = settings.base_model_revision = None
        try:
            with written_aside(save_directory) as folder:
                return super().save_pretrained(folder, *args, **self.save_options | kwargs)
        finally:
            settings.base_model_name_or_path, settings.base_model_revision = base

    def _save_config_only(self, save_directory, base: tuple[str | None, str | None], push_to_hub=False, **kwargs):
        settings = self.config.holitom_config
        name = base[0] or self.config._name_or_path
        if not name:
            raise ValueError(
                "a config-only checkpoint must name its base model, and this model was not loaded from one: set "
                "model.config.holitom_config.base_model_name_or_path first"
            )
        if is_local(name):
            name = os.path.abspath(os.path.expanduser(name))
            logger.warning(f"The checkpoint takes its weights from {name}: only this machine can load it.")
        settings.base_model_name_or_path = name
        try:
            self.config.architectures = [type(self).__name__]
            self.config.dtype = str(self.dtype).removeprefix("torch.")
            processor = {
                "processor_class": self.config.backbone.upstream_processor,
                "auto_map": {name: self.config.auto_map[name] for name in ("AutoProcessor", "AutoVideoProcessor")},
            }
            texts = {
                "processor_config.json": json.dumps(processor, indent=2) + "\n",
                "README.md": model_card(self.config, is_config_only=True),
            }
            with written_aside(save_directory) as folder:
                self.config.save_pretrained(folder)
                if self.can_generate():
                    self.generation_config.save_pretrained(folder)
                for name, text in texts.items():
                    Path(folder, name).write_text(text, encoding="utf-8")
        finally:
            settings.base_model_name_or_path = base[0]
        if push_to_hub:
            self.push_to_hub(config_only=True, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        config_only: bool = False,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> str:
        """
        Overrides PushToHubMixin.push_to_hub: one commit with settings, code and a model card of ours, and the weights
        unless told otherwise. A model card that the repository already has stays.

        Args:
            repo_id: Repository to upload to, made if missing.
            config_only: Upload no weights, see `save_pretrained`.
            The rest: as upstream.

        Returns:
            The commit's address.

        Raises:
            OSError: If the Hub can't be reached or refuses; the repository is as it was then.
            ValueError: With `config_only`, if the base model is a folder, which nobody else has.
        """
        base = self.config.holitom_config.base_model_name_or_path or self.config._name_or_path
        if config_only and base and is_local(base):
            raise ValueError(
                f"without weights, nobody else could load {repo_id}: its base model is a folder of this machine. Set "
                "model.config.holitom_config.base_model_name_or_path to a repository, or push the weights, too"
            )
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, config_only=config_only, **kwargs)
            try:
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                card = Path(folder) / "README.md"
                if api.file_exists(repo_id, "README.md", revision=revision):
                    card.unlink(missing_ok=True)
                else:
                    card.write_text(model_card(self.config, config_only, repo_id), encoding="utf-8")
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message or "Upload HoliTom model",
                    revision=revision,
                    create_pr=create_pr,
                )
            except ValueError:
                raise
            except Exception as error:  # the HTTP library behind huggingface_hub, and its errors, differ by version
                raise OSError(f"no file of {repo_id!r} was changed on the Hub: {error}") from error


def base_model_of(checkpoint: str | os.PathLike, kwargs: dict) -> tuple[str | None, str | None]:
    """
    The base model that a config-only checkpoint names, and its revision; `None` for one with weights of its own.

    Args:
        checkpoint: Folder or Hub repository.
        kwargs: Of `from_pretrained`: where and how to download.
    """
    settings = config_values(checkpoint, kwargs).get("holitom_config")
    settings = settings if isinstance(settings, dict) else {}
    return settings.get("base_model_name_or_path"), settings.get("base_model_revision")


def config_values(checkpoint: str | os.PathLike, kwargs: dict) -> dict:
    """
    What the `config.json` of a checkpoint says.

    Args:
        checkpoint: Folder or Hub repository.
        kwargs: Of `from_pretrained`: where and how to download.
    """
    hub_kwargs = {name: kwargs[name] for name in (*HUB_KWARGS, "revision", "subfolder") if name in kwargs}
    return PreTrainedConfig.get_config_dict(checkpoint, **hub_kwargs)[0]


def is_original(values: dict) -> bool:
    """
    Whether a `config.json` is one of LLaVA's authors. Their code calls its type "llava_qwen"; what they published says
    "llava", which is another model in transformers, so that the class counts, too.
    """
    return values.get("model_type") == "llava_qwen" or "LlavaQwenForCausalLM" in (values.get("architectures") or ())


def load_as_it_is(load, checkpoint: str | os.PathLike, *args, **kwargs):
    """
    A model or a processor from files of transformers, or of LLaVA's authors, which this package reads and no
    checkpoint's code does.

    Args:
        load: Upstream's `from_pretrained`, of a class of ours.
        checkpoint: Folder or Hub repository.
        args, kwargs: For `load`.

    Raises:
        ImportError: If the files are the authors', and the package is not there.
    """
    if is_original(config_values(checkpoint, kwargs)):
        load = partial(load_original, load)
    return load(checkpoint, *args, **kwargs)


def _same_place(base: str, path: str | os.PathLike) -> bool:
    return os.path.isdir(base) and os.path.isdir(path) and os.path.samefile(base, path)


def _check_base(config, base: str, revision: str, checkpoint, hub_kwargs: dict) -> None:
    """Raises an error that names the cause if the base model is out of reach or of another architecture."""
    try:
        values, _ = type(config).get_config_dict(base, revision=revision, **hub_kwargs)
    except OSError as error:
        raise OSError(
            f"{checkpoint} holds no weights; they come from its base model {base!r} (revision {revision}), which "
            f"could not be read. If it is gated or private, log in or pass token=...; offline, pass a local folder as "
            f"base_model_name_or_path. The cause: {error}"
        ) from error
    found = values.get("model_type")
    if found != config.model_type:
        raise ValueError(
            f"{checkpoint} takes its weights from {base!r}, which is a {found!r} model, not {config.model_type!r}"
        )
    # Its configuration and not the parts of the file: transformers 4 wrote some decoders' settings beside all others.
    base_config = type(config).from_dict(values)
    for part in ("text_config", "vision_config"):
        ours, theirs = getattr(config, part), getattr(base_config, part)
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
            if getattr(ours, name, None) != getattr(theirs, name, None):  # experts' have other names
                raise ValueError(
                    f"{checkpoint} takes its weights from {base!r}, whose {part}.{name} is {getattr(theirs, name)}, "
                    f"but its own config says {getattr(ours, name)}"
                )
