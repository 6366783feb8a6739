import json

import pytest
import torch
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.apps.command_line import measuring as measuring_commands
from holitom_hf.apps.command_line.app import app
from holitom_hf.benchmarking import model_benchmark
from holitom_hf.benchmarking.architectures import (
    ARCHITECTURES,
    LLAVA_VIDEO_ARCHITECTURES,
    QWEN_ARCHITECTURES,
    architecture,
)
from holitom_hf.benchmarking.backbones import MEASURED
from holitom_hf.benchmarking.measuring import Spread, alternate, count_waits, machine, peak_bytes, threads
from holitom_hf.benchmarking.models import contest
from holitom_hf.benchmarking.report import compare, read_result
from holitom_hf.benchmarking.scaling import growth, over_frames
from holitom_hf.benchmarking.stage_benchmark import MachineLimits, run_stage_benchmark
from holitom_hf.benchmarking.synthetic import synthetic_features
from holitom_hf.merging import TokenKind
from holitom_hf.merging.segmentation import frame_similarity

from ..videos import write_video


CPU = torch.device("cpu")
LIMITS = MachineLimits(bytes_per_second=1e10, operations_per_second=1e11)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings(**changes):
    return HoliTomConfig(**{"retention_ratio": 0.2, "similarity_threshold": 0.65, "inner_merge_layer": 5} | changes)


SMALL_QWEN = ["qwen2.5-vl-small", "qwen3-vl-small", "qwen3-vl-moe-small", "qwen3.5-small", "qwen3.5-moe-small"]
INNER_LAYER = {"qwen3.5-small": 4, "qwen3.5-moe-small": 4}  # behind full attention; the others' is 5


@pytest.fixture(scope="module", params=["tiny", "llava-video-small", *SMALL_QWEN])
def game(request):
    config = architecture(request.param, settings(inner_merge_layer=INNER_LAYER.get(request.param, 5)))
    return contest(config, 4, 2, CPU, torch.float32, static_share=0.5)


def test_both_models_are_the_same_weights_in_the_same_memory(game):
    ours = dict(game.models["holitom"].named_parameters())
    theirs = dict(game.models["plain"].named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].data_ptr() == weight.data_ptr() for name, weight in ours.items())
    with torch.inference_mode():
        plain = game.models["plain"](**game.inputs()).logits
        whole = game.models["holitom"](
            **game.inputs(), holitom_config={"retention_ratio": 1.0, "inner_method": "none"}
        ).logits
    assert torch.equal(plain, whole)
    assert plain.std() > 0.01


def test_no_weight_is_left_as_the_memory_was(game):
    config = game.models["holitom"].config
    again = contest(config, 4, 1, CPU, torch.float32).models["plain"].state_dict()
    for name, weight in game.models["plain"].state_dict().items():
        assert torch.equal(again[name], weight), name
    routers = [weight for name, weight in again.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == (8 if hasattr(config.text_config, "num_experts") else 0)
    assert all(0.01 < router.std() < 0.03 for router in routers)


def test_models_made_without_memory_have_the_buffers_of_others(game):
    usual = dict(type(game.models["holitom"])(game.models["holitom"].config).named_buffers())
    for model in game.models.values():
        found = dict(model.named_buffers())
        assert found.keys() == usual.keys()
        assert all(torch.equal(found[name], value) for name, value in usual.items())


def test_upstreams_model_is_upstreams(game):
    kind, ours = type(game.models["plain"]), type(game.models["holitom"])
    if game.models["holitom"].config.backbone.has_upstream:
        assert kind.__module__.startswith("transformers.")
        assert issubclass(ours, kind)
    else:  # nothing to compare with but ours as it is without compression
        assert kind is ours
        with torch.inference_mode():
            assert game.models["plain"](**game.inputs()).merged_videos is None


def test_the_model_sees_the_chosen_redundancy(game):
    with torch.inference_mode():
        video = game.models["holitom"](**game.inputs()).merged_videos[0][0]
    num_frames = 4 // game.backbone.frames_together
    is_static = (video.assignment[0] >= 0) & (video.kind[video.assignment[0]] == TokenKind.STATIC)
    assert video.segments == [(0, num_frames)]
    num_tokens = int((video.kind != TokenKind.NEWLINE).sum())
    assert abs(num_tokens - 0.2 * num_frames * game.backbone.operations.tokens_per_frame) < 8
    assert 0.4 < is_static.float().mean() < 0.6


def test_the_tower_sees_the_chosen_redundancy(game):
    pixels = game.media["pixel_values_videos"]
    if pixels.ndim == 2:
        rows = pixels.view(2, 2, -1, pixels.shape[-1])  # of two videos, two temporal patches
    else:
        patches = pixels[..., : 27 * 14, : 27 * 14].unfold(3, 14, 14).unfold(4, 14, 14)
        rows = patches.permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)
    repeats = (rows[:, 1:] == rows[:, :1]).all(-1).float()
    assert ((repeats.mean(-1) - 0.5).abs() < 0.01).all()


def test_a_question_for_more_rows_is_the_first_one_again(game):
    once, several, both = game.inputs(1), game.inputs(3), game.inputs()
    for name, value in several.items():
        assert torch.equal(value, torch.cat([once[name]] * 3))
        assert torch.equal(once[name], both[name][: len(once[name])])


@pytest.mark.parametrize("arch", ["qwen2.5-vl-small", "qwen3-vl-small"])
@pytest.mark.parametrize("tokens", [(2, 4), (5, 3)])
@pytest.mark.parametrize("num_frames", [2, 5])
def test_clips_are_preprocessed_to_the_size_that_is_asked(arch, tokens, num_frames):
    config = architecture(arch, settings())
    size = tuple(2 * config.vision_config.patch_size * side for side in tokens)
    measured = MEASURED[config.model_type](config, num_frames, size)
    width, height = measured.clip_size
    frames = torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8)
    features = measured.preprocess(measured.processor(), frames, CPU)
    assert features["video_grid_thw"].tolist() == [[-(-num_frames // 2), 2 * tokens[0], 2 * tokens[1]]]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_synthetic_features_repeat_in_the_chosen_share(share):
    similarity = frame_similarity(synthetic_features(20, 50, 256, share, scene_frames=8))
    is_inside = torch.arange(1, 20) % 8 != 0
    assert ((similarity > 0.65).sum(1)[is_inside] == round(50 * share)).all()
    assert (similarity[~is_inside] < 0.65).all()


def test_spreads_are_quartiles():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_functions_take_turns_and_warm_up_is_not_measured():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in times.values()] == [3, 3]


def test_the_peak_is_what_a_call_needs_for_a_moment():
    peak = peak_bytes(lambda: torch.ones(2**24).sum(), CPU)
    assert peak is None or 62 * 2**20 < peak < 80 * 2**20  # the system counts in batches of pages


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
        assert machine(CPU)["threads"] == 1
    assert torch.get_num_threads() == before
    assert torch.cuda.is_available() or count_waits(lambda: None) is None


def spread(median, width=0.01):
    return {"median": median, "lower": median - width, "upper": median + width, "count": 5}


def record(times, **values):
    steps = {name: spread(median) for name, median in times.items()}
    return {"machine": {"device": "a processor"}, "result": {"steps": steps} | values}


def test_a_comparison_names_what_got_worse_and_nothing_else():
    usual = {"one": 1.0, "two": 2.0, "three": 3.0}
    old = record(usual, cache_bytes=1000, operations={"launches": 10})
    assert compare(old, old) == []
    assert (
        compare(old, record({"one": 0.5, "two": 2.1, "three": 3.0}, cache_bytes=900, operations={"launches": 9})) == []
    )
    worse = record({"one": 1.0, "two": 2.6, "three": 3.0}, cache_bytes=1100, operations={"launches": 11})
    assert compare(old, worse) == [
        "SLOWER steps/two: 2.00 s -> 2.60 s (+30%)",
        "LARGER cache_bytes: 0.0 MiB -> 0.0 MiB",
        "MORE operations/launches: 10 -> 11",
    ]
    assert compare(old, record({"one": 1.0, "two": 2.0})) == [
        "NOT MEASURED cache_bytes",
        "NOT MEASURED operations/launches",
        "NOT MEASURED steps/three",
    ]


def test_peaks_are_larger_only_by_more_than_a_system_hands_out_at_once():
    old, size = record({"one": 1.0}, peak_bytes=2**30), 2**30
    assert compare(old, record({"one": 1.0}, peak_bytes=size + 50 * 2**20)) == []
    assert compare(old, record({"one": 1.0}, peak_bytes=size + 60 * 2**20)) == [
        "LARGER peak_bytes: 1.00 GiB -> 1.06 GiB"
    ]


def test_a_slower_machine_is_told_from_a_slower_step():
    old = record({"one": 1.0, "two": 2.0, "three": 3.0})
    new = record({"one": 1.5, "two": 4.5, "three": 4.5})
    new["machine"] = {"device": "another"}
    assert compare(old, new) == [
        "device was a processor, is another",
        "all steps together take +50%: the machine is not as it was, or all of them changed",
        "SLOWER steps/two: 2.00 s -> 4.50 s (+125%)",
    ]


@pytest.fixture(scope="module")
def bench_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    patch = pytest.MonkeyPatch()
    patch.setattr(model_benchmark, "CLIP_SECONDS", 0.2)
    options = ["--frames", 2, "--new-tokens", 2, "--redundancy", 0.5]
    first = run(
        *["bench", *options, "--batch-size", 2, "--rounds", 2, "--largest-batch", 2, "--out", folder / "one.json"]
    )
    second = run("bench", *options, "--rounds", 1, "--out", folder / "two.json", "--compare", folder / "one.json")
    patch.undo()
    return folder, first, second


def test_bench_measures_every_step_of_both_models(bench_files):
    folder, first, _ = bench_files
    assert first.exit_code == 0, first.output
    result = read_result(folder / "one.json")["result"]
    both = {"decode", "preprocess", "vision_tower", "prefill", "first_token", "answer", "end_to_end"}
    own = {"importance", "segmentation", "merging", "compaction"}
    assert {step for step, by_model in result["steps"].items() if set(by_model) == {"plain", "holitom"}} == both
    assert {step for step, by_model in result["steps"].items() if set(by_model) == {"holitom"}} == own
    assert all(entry["count"] == 2 for by_model in result["steps"].values() for entry in by_model.values())
    for answer in result["steps"]["answer"].values():
        assert answer["lower"] > 0
    outer, inner = result["tokens"]["outer"], result["tokens"]["inner"]
    assert result["tokens"]["plain"] == 2 * 196 + 1 + 34
    assert inner < outer < 0.15 * result["tokens"]["plain"] + 34
    # Two rows, keys and values, two heads of 64 in float32; stage 3 from layer 5 of 8 on.
    assert result["cache_bytes"]["plain"] == 2 * 2 * 2 * 64 * 4 * 8 * result["tokens"]["plain"]
    assert result["cache_bytes"]["holitom"] == 2 * 2 * 2 * 64 * 4 * (5 * outer + 3 * inner)
    assert set(result["throughput"]) == {"plain", "holitom"}
    assert result["throughput"]["holitom"]["batch_size"] == 2
    assert result["throughput"]["holitom"]["tokens_per_second"] > 0
    for text in (
        "first token (tower to logits)",
        "HoliTom's own work before the decoder",
        "throughput, holitom, batch 2",
    ):
        assert text in first.output


def test_bench_compares_with_an_earlier_result(bench_files):
    folder, _, second = bench_files
    assert second.exit_code == 0, second.output
    assert "NOT MEASURED throughput/plain/batch_size" in second.output
    assert (folder / "two.json").exists()


def test_bench_measures_llava_video(tmp_path, monkeypatch):
    """As many frames are decoded as are asked for, whatever the processor's rate."""
    monkeypatch.setattr(model_benchmark, "CLIP_SECONDS", 0.2)
    options = ["--frames", 4, "--redundancy", 0.5, "--new-tokens", 2, "--rounds", 1]
    result = run("bench", "--arch", "llava-video-small", *options, "--out", tmp_path / "one.json")
    assert result.exit_code == 0, result.output
    assert "| step | uncompressed | HoliTom |" in result.output
    found = read_result(tmp_path / "one.json")["result"]
    assert all(set(found["steps"][step]) == {"plain", "holitom"} for step in model_benchmark.SHARED_STEPS)
    assert found["tokens"]["plain"] == 4 * 13 * 14 + 34
    assert found["tokens"]["inner"] < found["tokens"]["outer"] < 0.3 * found["tokens"]["plain"] + 34
    measured = MEASURED["llava_video"](architecture("llava-video-small", settings()), 4)
    frames, _ = measured.processor().decode(str(write_video(tmp_path / "clip.mp4", num_frames=50)))
    assert len(frames[0]) == 4


def test_usual_frames_are_those_of_the_published_results():
    found = run("flops", "--model", "llava-video-7b", "--preset", "llava-video-7b-r15")
    assert found.exit_code == 0, found.output
    assert "\n64 frames, 34 tokens of text, R = 15%" in found.output
    assert "\nNewlines are those of rows with a token" in found.output
    assert "\n32 frames, 34 tokens of text" in run("flops", "--model", "7b").output


@pytest.mark.parametrize("arch", SMALL_QWEN)
def test_bench_measures_qwen_at_a_size_that_is_asked(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(model_benchmark, "CLIP_SECONDS", 0.2)
    options = ["--frames", 4, "--size", 224, 448, "--new-tokens", 2, "--rounds", 1, "--batch-size", 2]
    result = run("bench", "--arch", arch, *options, "--largest-batch", 1, "--out", tmp_path / "one.json")
    assert result.exit_code == 0, result.output
    found = read_result(tmp_path / "one.json")["result"]
    assert all(set(found["steps"][step]) == {"plain", "holitom"} for step in model_benchmark.SHARED_STEPS)
    assert all(set(found["steps"][step]) == {"holitom"} for step in model_benchmark.OWN_STEPS)
    unit, text = (28, 2) if arch == "qwen2.5-vl-small" else (32, 2 * (6 + 2))
    assert found["tokens"]["plain"] == 2 * (224 // unit) * (448 // unit) + text + 34
    outer, inner = found["tokens"]["outer"], found["tokens"]["inner"]
    assert inner < outer < found["tokens"]["plain"] / 2
    # Two rows, keys and values, two heads of 64 in float32; stage 3 from layer 5 of 8 on, or between the two of them
    # with full attention.
    before, behind = (1, 1) if arch in INNER_LAYER else (5, 3)
    assert found["cache_bytes"]["plain"] == 2 * 2 * 2 * 64 * 4 * (before + behind) * found["tokens"]["plain"]
    assert found["cache_bytes"]["holitom"] == 2 * 2 * 2 * 64 * 4 * (before * outer + behind * inner)
    assert 0 < found["tower_share"] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--arch", "8b"], "no architecture '8b': choose one of 0.5b, 7b, 72b, tiny, qwen2.5-vl-7b"),
        (["bench", "--size", "224", "224"], "frames of LLaVA-OneVision are 384 pixels wide and high"),
        (["bench", "--arch", "qwen3-vl-small", "--size", "100", "64"], "sides that are multiples of 32"),
        (["bench", "--retention-ratio", "1.0"], "outer_method must be holitom and retention_ratio below 1"),
        (["bench", "--preset", "llava-onevision-7b-r10"], "inner_merge_layer"),
        (["bench", "--dtype", "int8"], "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        (["bench", "--device", "abacus"], "there is no device 'abacus'"),
        (["bench", "--compare", "nowhere.json"], "nowhere.json"),
        (["flops", "--model", "7b", "--retention-ratio", "0"], "retention_ratio"),
        (
            ["flops", "--model", "qwen3.5-9b", "--preset", "qwen3-vl-8b-r15"],
            "is 23, but the layer before it has no attention over all positions: choose one of 4, 8, 12, 16, 20",
        ),
        (
            ["flops", "--model", "qwen3-vl-8b", "--preset", "llava-video-7b-r15"],
            "'row' is for LLaVA",
        ),
        (["flops", "--model", "tiny", "--preset", "llava-onevision-7b-r15"], "but the decoder has 8 layers"),
        (["scaling", "nowhere", "--frames", "8"], "growth needs two or more numbers of frames"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps([1, 2]))
    result = run("bench", "--compare", tmp_path / "other.json")
    assert result.exit_code == 1
    assert "is not a result of this benchmark" in result.output


def test_flops_prints_the_papers_figure_and_the_exact_ones():
    result = run("flops", "--model", "7b", "--frames", 32, "--preset", "llava-onevision-7b-r10")
    assert result.exit_code == 0, result.output
    rows = {line.split("|")[1].strip(): line for line in result.output.splitlines() if line.startswith("|")}
    assert "40.77 T | 2.76 T | 6.8%" in rows["decoder, video tokens, the paper's formula"]
    assert "20.54 T | 20.54 T | 100.0%" in rows["vision tower, exact"]
    assert "119.61 T | 28.99 T | 24.2%" in rows["all, exact"]
    bundled = run("flops", "--model", "bundled", "--frames", 16)
    assert bundled.exit_code == 0
    assert "2.29 G" in bundled.output


def test_scaling_writes_its_table_plot_and_numbers(tmp_path):
    options = ["--frames", 2, 4, 8, "--batch-sizes", 1, 2, "--retention-ratios", 0.1, 0.5, "--dim", 16, "--rounds", 3]
    result = run("scaling", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    table = (tmp_path / "scaling.md").read_text()
    assert table.strip() in result.output
    runs = read_result(tmp_path / "scaling.json")["result"]
    asked = [(entry["num_frames"], entry["batch_size"], entry["retention_ratio"]) for entry in runs]
    assert asked == [(2, 1, 0.1), (4, 1, 0.1), (8, 1, 0.1), (8, 2, 0.1), (8, 1, 0.5)]
    again = run("scaling", tmp_path / "again", *options, "--compare", tmp_path / "scaling.json")
    assert again.exit_code == 0
    assert "NOT MEASURED" not in again.output


def test_growth_is_the_power_of_the_frames():
    results = [run_stage_benchmark(settings(), frames, 16, 8, limits=LIMITS, rounds=1) for frames in (4, 8, 16, 32)]
    for result in results:
        for stage, power in (("similarity", 1.0), ("stage 3", 2.0)):
            result.seconds[stage] = Spread.of([1e-3 * result.num_frames**power])
    assert growth(results, "similarity") == pytest.approx(1.0)
    assert growth(results, "stage 3") == pytest.approx(2.0)
    assert over_frames(results) == results


def test_the_floor_is_the_work_that_cannot_be_left_out():
    result = run_stage_benchmark(settings(retention_ratio=0.5), 4, 100, 64, 0.5, limits=LIMITS, rounds=1)
    # Reading 4 x 100 x 64 float32 once takes longer than three products for each value.
    assert result.floor["similarity"] == pytest.approx(4 * 100 * 64 * 4 / 1e10)
    # 50 static tokens over 4 frames are read again; what is kept is read and written.
    moved = 4 * (4 * 100 + 50 * 4 + 2 * result.num_tokens) * 64
    assert result.floor["stages 1+2"] == pytest.approx(moved / 1e10, rel=0.05)


def test_bench_and_flops_offer_every_architecture_and_every_backbone_that_is_measured():
    offered = measuring_commands.ALL_SIZES
    assert sorted(offered) == sorted(ARCHITECTURES + LLAVA_VIDEO_ARCHITECTURES + QWEN_ARCHITECTURES)
    assert {architecture(name).model_type for name in offered} == set(MEASURED)


@pytest.mark.parametrize("model", ["qwen3-vl-30b-a3b", "qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_an_architectures_own_layer_of_stage_3_is_that_of_its_presets(model):
    layers = {HoliTomConfig.from_preset(f"{model}-{rest}").inner_merge_layer for rest in ("r25", "r15", "r15-fast")}
    assert layers == {architecture(model).holitom_config.inner_merge_layer}
