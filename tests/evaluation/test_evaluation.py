"""`holitom-hf evaluate` on a small model with random weights: the figures, the file of answers, the tables."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionForConditionalGeneration
from typer.testing import CliRunner

from holitom_hf import HoliTomConfig
from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.command_line.app import app
from holitom_hf.bundled import BUNDLED_MODEL
from holitom_hf.bundled.questions import second_turns, write_set
from holitom_hf.bundled.tiny_model import tiny_model, tiny_processor
from holitom_hf.evaluation import report, running
from holitom_hf.evaluation.methods import ROWS, Run, ablation_runs, full_run, method_runs, settings_runs, vision_runs
from holitom_hf.evaluation.report import check_claims, summarize, write_report
from holitom_hf.evaluation.running import Result, describe, evaluate, is_right
from holitom_hf.evaluation.statistics import mcnemar


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model and a set of questions."""
    folder = tmp_path_factory.mktemp("evaluation")
    processor = tiny_processor()
    processor.save_pretrained(folder / "model")
    tiny_model(processor.tokenizer).save_pretrained(folder / "model")
    write_set(folder / "questions", 10, side=112, num_frames=16)
    return folder


@pytest.fixture(scope="module")
def answerer(folder):
    answerer = Answerer(str(folder / "model"), device="cpu")
    answerer.load_model()
    return answerer


@pytest.fixture(scope="module")
def asked(folder):
    from holitom_hf.bundled.questions import read_set

    return read_set(folder / "questions")


@pytest.fixture(scope="module")
def runs(answerer):
    return method_runs(answerer.config.holitom_config, list(ROWS), [0.2])


@pytest.fixture(scope="module")
def results(answerer, folder, asked, runs, tmp_path_factory):
    # By the attention that torch can count: another rounds otherwise, and tokens nearly alike merge in another order.
    with sdpa_kernel(SDPBackend.MATH):
        return evaluate(answerer, folder / "questions", asked, runs, tmp_path_factory.mktemp("out"), max_new_tokens=3)


def test_every_question_is_answered_once_with_every_method(results, asked, runs):
    assert {(r.run, r.id) for r in results} == {(run.name, question.id) for run in runs for question in asked}
    assert len(results) == len(runs) * len(asked)


def test_answers_are_those_of_one_question_at_a_time(answerer, folder, results, asked, runs):
    for run in runs[:3]:
        for question in asked[:4]:
            inputs = answerer.prepare(str(folder / "questions" / question.video), question.text)
            with sdpa_kernel(SDPBackend.MATH):
                answerer.encode(inputs)
                answer = answerer.generate(inputs, max_new_tokens=3, settings=run.settings)
            [result] = [r for r in results if (r.run, r.id) == (run.name, question.id)]
            assert result.answer == answer.text
            assert (result.tokens_outer, result.tokens_inner) == (
                answer.visual_tokens_outer,
                answer.visual_tokens_inner,
            )


@torch.inference_mode()
def test_a_second_question_is_answered_as_by_upstream_over_the_whole_conversation(tmp_path):
    """By the bundled model, one row after another and from pixels; batches hold first and second questions."""
    answerer = Answerer(str(BUNDLED_MODEL), device="cpu", dtype="float32")
    answerer.load_model()
    written = write_set(tmp_path, 7, "unseen-turns", side=112)
    questions = [replace(written[0], before=None), *written[1:]]
    runs = method_runs(answerer.config.holitom_config, ["holitom", "farthest"], [0.15])
    results = evaluate(answerer, tmp_path, questions, runs, tmp_path, max_new_tokens=3)
    upstream = LlavaOnevisionForConditionalGeneration.from_pretrained(BUNDLED_MODEL, dtype="float32").eval()
    processor = answerer.processor

    def answer(model, video, messages, **kwargs):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        num_frames = next(question.num_frames for question in questions if question.video == video)
        inputs = processor(text=text, videos=str(tmp_path / video), num_frames=num_frames, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, **kwargs)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def user(text, *parts):
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    for run in runs:
        model, kwargs = (answerer.model, {"holitom_config": run.settings}) if run.name != "full" else (upstream, {})
        for question in questions:
            [result] = [r for r in results if (r.run, r.id) == (run.name, question.id)]
            messages, first = [user(question.text, {"type": "video"})], None
            if question.before is not None:
                before = user(question.before, {"type": "video"})
                first = answer(model, question.video, [before], **kwargs)
                said = {"role": "assistant", "content": [{"type": "text", "text": first}]}
                messages = [before, said, user(question.text)]
            assert result.first_answer == first
            assert result.answer == answer(model, question.video, messages, **kwargs), run.name
    assert len({r.answer for r in results}) > 3


def test_figures(results, runs):
    rows = {row.run: row for row in summarize(results, runs)}
    assert rows["full"].tokens_outer == rows["full"].tokens_inner == 16 * 49 + 1
    assert rows["full"].flops_share == rows["full"].flops_share_counted == 1
    for name, row in rows.items():
        assert 0 < row.flops_share <= 1
        assert row.flops_share_counted == pytest.approx(row.flops_share, rel=0.35), name
        assert row.accuracy_low <= row.accuracy <= row.accuracy_high
    assert rows["holitom@0.2"].tokens_inner < rows["holitom@0.2"].tokens_outer < 0.3 * 785
    assert rows["holitom@0.2"].flops_share < rows["holitom-outer@0.2"].flops_share
    assert rows["fastv@0.2"].tokens_outer == 785
    assert rows["fastv@0.2"].tokens_inner == pytest.approx(0.2 * 785, abs=1)


@torch.inference_mode()
def test_operations_are_those_that_torch_counts_from_pixels_to_the_first_token(answerer, folder, asked, results, runs):
    """Of questions about two videos, whose prompts differ in length."""
    chosen = {question.video: question for question in asked}
    for run in runs:
        for question in list(chosen.values())[:2]:
            inputs = answerer.prepare(str(folder / "questions" / question.video), question.text).features
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                answerer.model(**inputs, holitom_config=run.settings, logits_to_keep=1)
            [result] = [r for r in results if (r.run, r.id) == (run.name, question.id)]
            assert result.operations == counter.get_total_flops(), run.name


def test_shares_of_all_operations_are_of_the_same_questions(results, runs):
    old = [replace(r, operations=None) if r.id.endswith("-0") else r for r in results]
    rows, some = ({row.run: row for row in summarize(given, runs)} for given in (results, old))
    for run in runs:
        assert rows[run.name].flops_share < rows[run.name].operations_share <= 1 or run.name == "full"
        given = [r for r in old if r.operations is not None and r.run in (run.name, "full")]
        own, full = (sum(r.operations for r in given if r.run == name) for name in (run.name, "full"))
        assert some[run.name].operations_share == pytest.approx(own / full)
    assert rows["full"].operations_share == 1


def test_answers_from_before_operations_were_counted_are_read(answerer, folder, asked, runs, tmp_path):
    first = evaluate(answerer, folder / "questions", asked[:2], runs[:2], tmp_path, max_new_tokens=1)
    head, *lines = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    for line in lines:
        del line["operations"]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    again = evaluate(answerer, tmp_path / "no videos needed", asked[:2], runs[:2], tmp_path)
    assert again == [replace(result, operations=None) for result in first]
    rows = summarize(again, runs[:2])
    assert [row.operations_share for row in rows] == [None, None]
    files = write_report(rows, again, "holitom-hf evaluate", tmp_path)
    assert "accuracy_operations.png" not in [file.name for file in files]


def test_a_stopped_evaluation_goes_on_and_repeats_nothing(answerer, folder, asked, runs, tmp_path):
    whole = evaluate(answerer, folder / "questions", asked, runs[:3], tmp_path, batch_size=4, max_new_tokens=3)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:8]) + lines[8][:20])  # killed while it wrote
    again = evaluate(answerer, folder / "questions", asked, runs[:3], tmp_path, batch_size=4, max_new_tokens=3)
    assert sorted((r.run, r.id, r.answer) for r in again) == sorted((r.run, r.id, r.answer) for r in whole)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + len(whole)

    before = (tmp_path / "answers.jsonl").read_text()
    evaluate(answerer, tmp_path / "no videos needed", asked, runs[:3], tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == before


def test_answers_of_another_set_are_not_mixed_in(answerer, folder, asked, runs, tmp_path):
    evaluate(answerer, folder / "questions", asked[:2], runs[:1], tmp_path, max_new_tokens=1)
    with pytest.raises(ValueError, match="another model or another set of questions"):
        evaluate(answerer, folder / "questions", asked[:3], runs[:1], tmp_path, max_new_tokens=1)
    weight = answerer.model.lm_head.weight
    with torch.no_grad():
        weight.mul_(2)
    try:  # a model of the same name that was trained on
        with pytest.raises(ValueError, match="another model or another set of questions"):
            evaluate(answerer, folder / "questions", asked[:2], runs[:1], tmp_path, max_new_tokens=1)
    finally:
        with torch.no_grad():
            weight.div_(2)


def test_answers_under_other_settings_of_the_same_name_are_given_anew(answerer, folder, asked, tmp_path):
    own = answerer.config.holitom_config
    before, after = (
        Run("variant", replace(own, outer_method="random_tokens", retention_ratio=ratio)) for ratio in (0.5, 0.1)
    )

    def answered_with(*runs):
        return evaluate(answerer, folder / "questions", asked[:3], list(runs), tmp_path, max_new_tokens=1)

    first, second = answered_with(full_run(own), before), answered_with(full_run(own), after)
    assert len(first) == len(second) == 6
    assert [r.seconds for r in first if r.run == "full"] == [r.seconds for r in second if r.run == "full"]
    lengths = [{r.id: r.tokens_outer for r in results if r.run == "variant"} for results in (first, second)]
    assert all(lengths[1][name] < 0.5 * lengths[0][name] for name in lengths[0])
    assert answered_with(before) == [r for r in first if r.run == "variant"]


def test_second_questions_are_another_set_and_first_ones_the_set_they_were(answerer, asked, monkeypatch):
    seen = []
    monkeypatch.setattr(running.json, "dumps", lambda value, **kwargs: seen.append(value) or "")
    describe(answerer, [asked[0], *second_turns(asked[:2])])
    first, second, _ = seen[0][3]
    assert set(first) == {"type", "text", "answer", "about", "video", "id", "num_frames"}
    assert second["before"] == asked[1].text


def test_a_model_with_other_settings_of_its_own_goes_on_with_the_same_file(answerer, folder, asked, tmp_path):
    run = full_run(answerer.config.holitom_config)
    first = evaluate(answerer, folder / "questions", asked[:2], [run], tmp_path, max_new_tokens=1)
    own = answerer.config.holitom_config
    answerer.config.holitom_config = replace(own, similarity_threshold=0.3)
    try:
        assert evaluate(answerer, folder / "questions", asked[:2], [run], tmp_path, max_new_tokens=1) == first
    finally:
        answerer.config.holitom_config = own


def test_rows_of_any_settings_are_named_by_what_differs(answerer):
    own = answerer.config.holitom_config
    [one] = settings_runs(own, [{"similarity_threshold": 0.5}])
    assert one.name == "similarity_threshold=0.5"
    assert one.settings == replace(own, similarity_threshold=0.5)
    several = settings_runs(own, [{}, {"outer_method": "random_tokens"}], [own.retention_ratio, 0.05])
    assert [run.name for run in several] == [
        "the model's own settings",
        "retention_ratio=0.05",
        "outer_method=random_tokens",
        "retention_ratio=0.05, outer_method=random_tokens",
    ]
    assert [run.retention_ratio for run in several] == [own.retention_ratio, 0.05] * 2
    [preset] = settings_runs(own, ["llava-onevision-7b-r10"])
    assert (preset.name, preset.settings.retention_ratio) == ("llava-onevision-7b-r10", 0.1)
    [lower] = settings_runs(own, ["llava-onevision-7b-r10"], [0.05])
    assert (lower.name, lower.settings.retention_ratio) == ("llava-onevision-7b-r10 at 0.05", 0.05)


@pytest.mark.parametrize(("answer", "truth", "right"), [(" Red.", "red", True), ("red circle", "red", False)])
def test_what_counts_as_right(answer, truth, right):
    assert is_right(answer, truth) is right


def made_up(run, share_right, flops, num=200):
    return [
        Result(
            run,
            f"q{i}",
            f"v{i // 4}",
            "color",
            run,
            i < share_right * num,
            100,
            50 + (run == "full"),
            flops,
            None,
            0.1,
        )
        for i in range(num)
    ]


def test_claims_hold_and_do_not_hold():
    own = replace(tiny_model(tiny_processor().tokenizer).config.holitom_config)
    runs = method_runs(own, ["holitom", "holitom-outer", "frames"], [0.15, 0.05])
    results = (
        made_up("full", 0.8, 100)
        + made_up("holitom@0.15", 0.8, 10)
        + made_up("holitom@0.05", 0.4, 4)
        + made_up("holitom-outer@0.15", 0.8, 12)
        + made_up("holitom-outer@0.05", 0.6, 5)
        + made_up("frames@0.15", 0.7, 14)
        + made_up("frames@0.05", 0.5, 5)
    )
    claims = {claim.text: claim for claim in check_claims(summarize(results, runs), results)}
    assert claims["HoliTom keeps >= 99% of the accuracy at R = 15%"].verdict == "holds"
    assert claims["HoliTom at R = 15% is ahead of fewer frames at equal FLOPs"].verdict == "holds"
    assert claims["HoliTom at R = 5% is ahead of fewer frames at equal FLOPs"].verdict == "does not hold"
    assert claims["Stage 3 costs less than 1 point at R = 15%"].verdict == "holds"
    assert claims["Stage 3 costs less than 1 point at R = 5%"].verdict == "does not hold"


def answered(run, right, flops):
    """A question a video, right where `right` says so."""
    return [
        Result(run, f"q{i}", f"v{i}", "color", run, bool(r), 100, 50 + (run == "full"), flops, None, 0.1)
        for i, r in enumerate(right)
    ]


def paired_interval(ours, theirs):
    """Of the mean of paired differences, by its standard error: what the bootstrap must come near to."""
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    error = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return difference.mean() - error, difference.mean() + error


@pytest.mark.parametrize(
    ("lost", "won", "verdict"),
    [(0, 12, "holds"), (12, 0, "does not hold"), (30, 36, "no difference"), (0, 0, "no difference")],
)
def test_a_difference_inside_its_paired_interval_is_none(lost, won, verdict):
    own = replace(tiny_model(tiny_processor().tokenizer).config.holitom_config)
    runs = method_runs(own, ["holitom", "frames"], [0.15])
    theirs = np.arange(400) % 2
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 1)[:lost]] = 0
    ours[np.flatnonzero(theirs == 0)[:won]] = 1
    results = answered("full", np.ones(400), 100) + answered("holitom@0.15", ours, 10)
    results += answered("frames@0.15", theirs, 10)
    [claim] = [c for c in check_claims(summarize(results, runs), results) if "fewer frames" in c.text]
    assert claim.verdict == verdict
    difference, low, high = (float(number) for number in re.findall(r"[-+]\d+\.\d", claim.measured))
    assert difference == pytest.approx(100 * (ours.mean() - theirs.mean()), abs=0.051)
    assert (low, high) == pytest.approx([100 * end for end in paired_interval(ours, theirs)], abs=0.4)
    # Unpaired, the intervals of the two accuracies overlap in every case here.
    rows = {row.run: row for row in summarize(results, runs)}
    assert rows["holitom@0.15"].accuracy_low < rows["frames@0.15"].accuracy_high
    assert rows["frames@0.15"].accuracy_low < rows["holitom@0.15"].accuracy_high


def test_a_share_of_the_accuracy_is_told_only_outside_its_interval():
    own = replace(tiny_model(tiny_processor().tokenizer).config.holitom_config)
    runs = method_runs(own, ["holitom", "holitom-outer"], [0.15])
    right = np.arange(400) < 300
    slightly = right.copy()
    slightly[:4] = False
    results = answered("full", right, 100) + answered("holitom@0.15", slightly, 10)
    results += answered("holitom-outer@0.15", right, 12)
    claims = {claim.text: claim.verdict for claim in check_claims(summarize(results, runs), results)}
    assert claims["HoliTom keeps >= 99% of the accuracy at R = 15%"] == "cannot be told"
    assert claims["Stage 3 costs less than 1 point at R = 15%"] == "cannot be told"


def test_between_two_points_of_a_curve_the_comparison_is_with_their_mixture():
    own = replace(tiny_model(tiny_processor().tokenizer).config.holitom_config)
    runs = method_runs(own, ["holitom", "frames"], [0.15, 0.05])
    rng = np.random.default_rng(1)
    right = {name: rng.random(300) < share for name, share in (("a", 0.7), ("b", 0.6), ("c", 0.5))}
    results = answered("full", np.ones(300), 100) + answered("holitom@0.15", right["a"], 12)
    results += answered("holitom@0.05", right["a"], 2)
    results += answered("frames@0.15", right["b"], 16) + answered("frames@0.05", right["c"], 8)
    claims = {claim.text: claim for claim in check_claims(summarize(results, runs), results)}
    for ratio, mixture in (("15", (right["b"] + 1.0 * right["c"]) / 2), ("5", right["c"])):
        claim = claims[f"HoliTom at R = {ratio}% is ahead of fewer frames at equal FLOPs"]
        low, high = (float(number) for number in re.findall(r"[-+]\d+\.\d", claim.measured)[1:])
        assert (low, high) == pytest.approx([100 * end for end in paired_interval(right["a"], mixture)], abs=0.6)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 1), (3, 9), (12, 12)])
def test_mcnemar_is_the_share_of_coin_flips_that_are_as_unequal(won, lost):
    theirs = np.array([0] * won + [1] * lost + [0, 1, 1])
    ours = np.array([1] * won + [0] * lost + [0, 1, 1])
    counted = mcnemar(answered("a", ours, 1)[::-1], answered("b", theirs, 1))
    flips = np.random.default_rng(0).binomial(won + lost, 0.5, 200_000)
    share = (abs(flips - (won + lost) / 2) >= abs(won - lost) / 2).mean()
    assert counted[:2] == (won, lost)
    assert counted[2] == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("fault", ["same answers", "same lengths"])
def test_a_run_that_does_not_show_that_it_shortens_gets_no_verdict(fault, tmp_path):
    own = replace(tiny_model(tiny_processor().tokenizer).config.holitom_config)
    runs = method_runs(own, ["holitom"], [0.15])
    full, short = made_up("full", 0.8, 100), made_up("holitom@0.15", 0.8, 10)
    assert check_claims(summarize(full + short, runs), full + short)
    changed = {"answer": "full"} if fault == "same answers" else {"tokens_inner": 51}
    results = full + [replace(result, **changed) for result in short]
    rows = summarize(results, runs)
    assert [row.is_running for row in rows] == [True, False]
    assert check_claims(rows, results) == []
    write_report(rows, results, "holitom-hf evaluate", tmp_path)
    assert "| HoliTom (**not running**) | 15% |" in (tmp_path / "table.md").read_text()


def test_intervals_shrink_with_the_number_of_videos():
    runs = [Run("full", None, "full")]
    widths = []
    for num in (40, 4000):
        results = made_up("full", 0.5, 1, num)
        [row] = summarize(results, runs)
        widths.append(row.accuracy_high - row.accuracy_low)
        assert row.accuracy == 0.5
        assert row.accuracy_low < 0.5 < row.accuracy_high
    assert 6 < widths[0] / widths[1] < 15


def test_report_holds_every_run(results, runs, answerer, tmp_path):
    pytest.importorskip("matplotlib")
    files = write_report(summarize(results, runs), results, "holitom-hf evaluate", tmp_path)
    pictures = ["accuracy_flops.png", "accuracy_operations.png", "accuracy_types.png"]
    assert [file.name for file in files] == ["table.md", "table.json", *pictures]
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["run"] for row in table["rows"]] == [run.name for run in runs]
    assert table["torch"] == torch.__version__.split("+")[0]
    text = (tmp_path / "table.md").read_text()
    for method in ROWS.values():
        assert re.search(rf"\| {re.escape(method.label)}( \(\*\*not running\*\*\))? \| 20% \|", text)
    for line in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE):
        assert line.count("|") >= 4
    for file in files[2:]:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_towers_that_leave_something_out_are_compared_with_the_same_behind_all_patches(
    answerer, folder, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(report, "MIN_VIDEOS", 1)
    own = answerer.config.holitom_config
    runs = [full_run(own), *vision_runs(own, ratio=0.3)]
    results = evaluate(answerer, folder / "questions", asked, runs, tmp_path, max_new_tokens=3, num_counted=0)
    question = asked[0]
    for run in runs:
        if not run.settings.has_vision_stage:
            continue
        pixels = answerer.processor.video_processor(str(folder / "questions" / question.video), return_tensors="pt")
        features = answerer.model.get_video_features(
            pixels["pixel_values_videos"], holitom_config=run.settings, return_vision_states=False
        )
        inputs = answerer.prepare(str(folder / "questions" / question.video), question.text)
        answerer.encode(inputs)
        inputs.encoded = features
        answer = answerer.generate(inputs, max_new_tokens=3, settings=run.settings)
        [result] = [r for r in results if (r.run, r.id) == (run.name, question.id)]
        assert result.answer == answer.text
        [whole] = [r for r in results if (r.run, r.id) == (run.baseline, question.id)]
        assert (result.operations < whole.operations) == (features.rows_by_layer[0].min() < 196)

    # Made up so that one group tells: reuse as good as all patches for half of the operations, the others worse.
    for result in results:
        run = next(run for run in runs if run.name == result.run)
        number, how = int(result.id.split("-")[-1]), run.settings.vision_method
        result.is_right = not run.settings.has_vision_stage or how == "reuse" or number > 0
        result.answer = f"{result.run} {result.is_right}"
        result.operations = 1.0 if not run.settings.has_vision_stage else {"reuse": 0.4}.get(how, 0.5)
    rows = summarize(results, runs)
    claims = {claim.text: claim.verdict for claim in check_claims(rows, results)}
    group = "vision tower, HoliTom"
    assert claims[f"{group}: reuse 0.98 loses against all patches"] == "no difference"
    assert claims[f"{group}: tome 0.5 loses against all patches"] == "holds"
    assert claims[f"{group}: reuse 0.98 is ahead of frames"] == "holds"
    files = write_report(rows, results, "command", tmp_path)
    assert [file.name for file in files] == ["table.md", "table.json", "accuracy_vision.png"]
    table = (tmp_path / "table.md").read_text()
    assert f"Ablation at R = 30%: {group}" in table
    assert table.count("| reuse 0.98 |") == 3
    assert table.count("| uncompressed |") == 3  # of all rows, of types, and before the group without merging


def test_ablations_change_one_field(answerer):
    own = answerer.config.holitom_config
    runs = ablation_runs(own, 8)
    assert len({run.name for run in runs}) == len(runs)
    assert {run.ablation for run in runs} >= {"similarity threshold tau", "layer k of stage 3", "segmentation"}
    assert full_run(own).settings.is_identity
    base, ours = replace(own, retention_ratio=0.15), ROWS["farthest"].settings(own, 0.15)
    for run in runs:
        if run.ablation.startswith("places and sizes"):
            continue
        start = ours if run.ablation == "farthest points" else base
        changed = [name for name, value in run.settings.to_dict().items() if value != start.to_dict()[name]]
        assert len(changed) <= 2
    for group in {run.ablation for run in runs if run.ablation.startswith("places and sizes")}:
        members = [run.settings for run in runs if run.ablation == group]
        assert {(s.position_ids, s.proportional_attention) for s in members} == set(
            itertools.product(("packed", "kept"), (False, True))
        )
        same = [replace(s, position_ids="kept", proportional_attention=True) for s in members]
        assert all(settings == same[0] for settings in same)


def test_command_line(folder, tmp_path):
    arguments = ["evaluate", "--model", str(folder / "model"), "--questions", str(folder / "questions")]
    arguments += ["--methods", "holitom", "frames", "--retention-ratios", "0.2", "0.1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for row in ("| uncompressed |", "| HoliTom | 20% |", "| HoliTom | 10% |", "| fewer frames | 10% |"):
        assert row in result.stdout
    assert "VisionZip" not in result.stdout

    varied = [*arguments[:5], "--settings", '{"similarity_threshold": 0.5}', '{"inner_method": "none"}']
    result = CliRunner().invoke(app, [*varied, "--out", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for row in ("| uncompressed |", "| similarity_threshold=0.5 | 15% |", "| inner_method=none | 15% |"):
        assert row in result.stdout
    assert "HoliTom" not in result.stdout


def test_a_set_of_the_split_and_seed_that_are_asked_for_is_drawn(folder, tmp_path):
    for split, seed in (("test", 0), ("validation", 3)):
        arguments = ["--num-questions", "1", "--split", split, "--seed", str(seed), "--methods", "holitom"]
        out = tmp_path / split
        result = CliRunner().invoke(
            app, ["evaluate", "--model", str(folder / "model"), "--device", "cpu", "--out", str(out), *arguments]
        )
        assert result.exit_code == 0, result.output
        [drawn] = out.glob("*/questions.jsonl")
        assert json.loads(drawn.read_text())["video"] == f"{split}-{seed}-0000.mp4"


def test_all_methods_have_one_word():
    runs = method_runs(HoliTomConfig(), ["all"], [0.2])
    assert [run.method for run in runs] == ["full", *ROWS]
    assert {"vidcom2", "divprune", "dycoke", "fastvid", "flashvid", "unicomp", "prunevid", "holitom_stop"} < set(ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "there is no method magic; choose from holitom"),
        (["--retention-ratios", "1.5"], "retention_ratio must be"),
        (["--questions", "nowhere"], "write a set with"),
        (["--settings", "tau"], "takes a JSON object of settings, got 'tau'"),
        (["--settings", '{"tau": 1}'], "has no field 'tau'"),
        (["--preset", "none-such"], "no HoliTom preset or file 'none-such'"),
    ],
)
def test_bad_arguments(folder, tmp_path, arguments, message):
    result = CliRunner().invoke(
        app, ["evaluate", "--model", str(folder / "model"), "--out", str(tmp_path), *arguments]
    )
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
