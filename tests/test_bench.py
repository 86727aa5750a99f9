"""Benchmarks: reports of the one form, files that repeat, mistakes in one line. What they measure is not asserted."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from datetime import datetime

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from harness.bench import bm25, click_log, decode, evaluation, governance, head, head_memory, loader, plain, towers
from harness.bench.ranks import Memory
from harness.bench.report import command_line, make_report
from harness.commands import ingest
from harness.core.errors import UserError
from harness.core.tables import format_table
from models.heads.row_optimizer import RowAdamW, RowOptimizerConfig
from tests.catalogues import draw_rows, make_catalogue, write_manifest
from tests.test_tasks import side

TINY = {"images": 5, "image_size": 16, "source_size": 40, "threads": 1, "pairs": 2}
FIELDS = {
    "name": str,
    "command": str,
    "commit": str,
    "date": str,
    "hardware": str,
    "headline": dict,
    "rows": list,
}


def check_report(report):
    """Raises where `report` is not of the form that harness/bench/report.py states; the oracle for every benchmark."""
    assert {name: type(value) for name, value in report.items()} == FIELDS
    assert all(report.values())
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert all(type(name) is str and type(value) is float for name, value in report["headline"].items())
    for row in report["rows"]:
        assert type(row) is dict
        assert all(type(value) in (str, int, float, bool, type(None)) for value in row.values())
    assert json.loads(json.dumps(report)) == report


def test_decode_reports_both_pipelines(capsys):
    report = decode.run(decode.DecodeConfig(**TINY))
    check_report(report)
    assert report["name"] == "decode"
    assert report["command"].endswith("decode --images 5 --image-size 16 --source-size 40 --threads 1 --pairs 2")
    assert [row["pair"] for row in report["rows"]] == [1, 2]
    headline = report["headline"]
    assert headline["dali_images_per_s"] > 0 and headline["pillow_images_per_s"] > 0
    assert headline["dali_vs_pillow_min"] <= headline["dali_vs_pillow"] <= headline["dali_vs_pillow_max"]
    printed = capsys.readouterr().out
    assert report["command"] in printed and all(name in printed for name in headline)


def test_loader_reports_all_three_ways(capsys):
    report = loader.run(loader.LoaderConfig(**{**TINY, "images": 35}))  # more than one batch, the last one smaller
    check_report(report)
    rates = ["shelfmark_images_per_s", "pillow_images_per_s", "bare_dali_images_per_s"]
    ratios = {"speedup_vs_pillow": rates[1], "fraction_of_bare_dali": rates[2]}
    assert [row["pair"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert list(row) == ["pair", *rates, *ratios] and min(row.values()) > 0
        assert all(row[key] == row[rates[0]] / row[other] for key, other in ratios.items())
    headline = report["headline"]
    assert all(headline[f"{key}_min"] <= headline[key] <= headline[f"{key}_max"] for key in ratios)
    assert set(headline) > set(rates) and "speedup_vs_pillow" in capsys.readouterr().out


def test_evaluation_reports_the_memory_of_each_stage():
    settings = evaluation.EvaluationBenchConfig(documents=(300,), ranks=(2,), queries=5, bare_titles=True)
    report = evaluation.run(settings)
    check_report(report)
    assert [row["stage"] for row in report["rows"]] == ["open", "evaluate", "export"]
    assert report["headline"] == {"largest_peak_mib": max(row["peak_mib"] for row in report["rows"])}


def test_pillow_in_a_data_loader_does_the_same_work(tmp_path):
    """Away from the border, where Pillow's filter is shorter than DALI's, both see the same picture."""
    spec = loader.PreprocessSpec(image_size=16)
    files = loader._draw(tmp_path, loader.LoaderConfig(**TINY))
    catalogue = loader.Catalogue(loader._ingest(tmp_path, files))
    sizes = np.stack([catalogue.index["width"], catalogue.index["height"]])
    found = torch.stack(loader._Photos(spec, files, sizes).__getitems__([*range(10, 15)]))  # of epoch 2
    ids = np.arange(5)
    reader = loader.ImageReader(catalogue, spec, "reference", 5, 1, torch.device("cpu"))
    with closing(reader), closing(catalogue):
        wanted, ok = reader.read(ids, reader.parameters(ids, epochs=2, train=True))
    assert ok.all() and (found - wanted)[:, :, 3:-3, 3:-3].abs().max() < 0.05


def test_the_command_line_writes_the_report(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", decode.MODULE, *flags, "--json", str(tmp_path / "decode.json")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    check_report(json.loads((tmp_path / "decode.json").read_text()))


def test_help_names_defaults_and_an_example(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decode", "--help"])
    with pytest.raises(SystemExit) as stop:
        decode.main()
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "default: 224" in text and decode.EXAMPLE in text and "--image-size" in text


@pytest.mark.parametrize(("flags", "named"), [(["--pairs", "0"], "pairs is 0"), (["--image", "3"], "'images'")])
def test_a_mistake_is_one_line(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decode", *flags])
    assert decode.main() == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_photos_repeat_and_differ():
    assert decode.photo(40, 1) == decode.photo(40, 1)
    assert len({decode.photo(40, number) for number in range(6)}) == 6


def test_no_image_is_timed_that_failed(monkeypatch):
    whole = decode.photo

    def cut(size, number):
        data = whole(size, number)
        return data if number else data[: len(data) // 2]

    monkeypatch.setattr(decode, "photo", cut)
    with pytest.raises(RuntimeError, match="failed to decode"):
        decode.run(decode.DecodeConfig(**TINY))


def test_numbers_of_other_types_become_plain():
    report = make_report("x", "true", {"rate": 3}, [{"a": 1, "b": None}])
    check_report(report)
    assert report["headline"] == {"rate": 3.0}


def test_a_table_is_aligned():
    rows = [{"name": "a", "rate": 12345.6, "n": 7}, {"name": "long", "rate": 0.01234}]
    assert format_table(rows).splitlines() == ["name    rate  n", "a     12,346  7", "long  0.0123  -"]
    assert format_table([]) == ""


def test_a_command_line_survives_a_shell():
    assert command_line("m", decode.DecodeConfig(images=3)).startswith("python -m m --images 3 --image-size 224")


def report_of(module, flags, file):
    """The report of a benchmark that starts ranks, in a process of its own: the pool's ranks have another parent."""
    command = [sys.executable, "-m", module, *flags.split(), "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads(file.read_text())
    check_report(report)
    return report


@pytest.mark.full
def test_head_reports_what_the_issue_asks_for(tmp_path):
    """Real ranks, every measurement once; and what a step must do whatever the machine."""
    flags = "--num-classes 4000 --embedding-dim 16 --ranks 2 --batch 16 --pairs 1"
    report = report_of(head.MODULE, flags, tmp_path / "head.json")
    bars = ["time_vs_partial_fc", "time_vs_partial_fc_small", "time_4m_over_1m"]
    bars += ["memory_vs_partial_fc", "memory_vs_partial_fc_8bit", "loss_memory_growth"]
    assert set(bars) < set(report["headline"]) and min(report["headline"].values()) > 0
    times = [row for row in report["rows"] if row["measure"] == "time"]
    for ours, other in zip(times[::2], times[1::2], strict=True):
        assert (ours["side"], ours["beside"]) == ("ours", other["side"]) and ours["sent_mb"] > 0
        assert 0 < ours["step_ms"] <= 1.001 * sum(ours[f"{phase}_ms"] for phase in head.PHASES)  # of the slowest ranks
        assert other["active_rows"] == pytest.approx(other["rate"] * other["classes"], rel=0.2)
    assert {row["side"] for row in times} == {side for side in head.SIDES if "bit" not in side} - {
        "ours_bf16",
        "insightface",
    }


def test_peak_memory_is_seen_and_starts_anew():
    memory = Memory(torch.device("cpu"))
    before = memory.start()
    torch.ones(50_000_000)
    assert 190e6 < memory.peak() - before < 230e6
    assert memory.peak() - memory.start() > 150e6 and memory.peak() - before < 50e6


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"num_classes": 11}, "does not divide"),
        ({"batch": 20}, "not a multiple"),
        ({"partial_fc": "nowhere.py"}, "is not a Python file"),
        ({"partial_fc": __file__}, "does not define PartialFC_V2"),
    ],
)
def test_a_head_benchmark_that_cannot_be_is_one_line(flags, named):
    with pytest.raises(UserError, match=named):
        head.HeadConfig(**flags)


def test_too_many_classes_are_told_before_memory_runs_out():
    with pytest.raises(UserError, match="GiB"):
        head.run(head.HeadConfig(num_classes=10**11))


def test_a_rank_that_fails_is_told_with_its_reason():
    command = [sys.executable, "-c", "from harness.bench.ranks import on_ranks; on_ranks(2, int)"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert "RuntimeError: a rank failed" in done.stderr and "TypeError: int() argument" in done.stderr


@pytest.mark.full
def test_head_memory_measures_a_point(tmp_path):
    flags = "--num-classes 80000 --embedding-dim 64 --ranks 2 --batch 4"
    report = report_of(head_memory.MODULE, flags, tmp_path / "head_memory.json")
    headline = report["headline"]
    assert headline["computed_mib_per_million_classes"] < headline["measured_mib_per_million_classes"]
    assert len(report["rows"]) == 22 and [row["kind"] for row in report["rows"]].count("measured") == 2


@pytest.mark.parametrize("side", ["ours_fp32", "ours_bf16_8bit"])
def test_computed_memory_is_that_of_the_tensors(side):
    ours = {"ours_fp32": {}, "ours_bf16_8bit": {"state": "8bit", "bf16_rows": "stochastic"}}[side]
    rows = torch.zeros(1000, 48, dtype=torch.bfloat16 if ours else torch.float32)
    state = RowAdamW(rows, RowOptimizerConfig(**ours)).row_state()
    found = rows.nbytes + sum(tensor.nbytes for tensor in state.values())
    config = head_memory.HeadMemoryConfig(embedding_dim=48, sample_rate=0.25)
    assert head_memory.computed_mib(side, config, 4000, 4) * 2**20 == pytest.approx(found + 250 * 48 * 4)


def test_towers_of_all_sides_are_timed_once_they_agree(monkeypatch):
    pytest.importorskip("transformers")
    for presets, name in ((towers.VISION, "vit_s16"), (towers.TEXT, "bert_small")):
        monkeypatch.setitem(
            presets, name, presets[name] | {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
        )
    report = towers.run(towers.TowersConfig(batch=2, tokens=8, pairs=2))
    check_report(report)
    headline = report["headline"]
    assert {"vit_s_vs_transformers", "bert_small_vs_transformers", "vit_s_images_per_s"} < set(headline)
    assert min(headline.values()) > 0 and [row["side"] for row in report["rows"]] == 2 * list(towers.SIDES)


def test_towers_that_compute_something_else_are_not_timed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(towers.TEXT, "bert_small", towers.TEXT["bert_small"] | {"num_layers": 1, "vocab_size": 99})
    real = towers.export_tower

    def another(config, state, layout):
        described, tensors = real(config, state, layout)
        return described | {"hidden_act": "relu"}, tensors

    monkeypatch.setattr(towers, "export_tower", another)
    with pytest.raises(RuntimeError, match="bert_small: transformers differs from plain"):
        towers.run(towers.TowersConfig(model=("bert_small",), batch=1, tokens=4, pairs=1))


def test_bm25_ranks_titles_as_by_hand(tmp_path):
    """Robertson's tf-idf with k1 1.5 and b 0.75, words without plural s; ties by id; a query of unknown words."""
    rows = draw_rows(tmp_path, classes=5, queries=0, size=24, seed=0)
    looks = [("red", "disc"), ("red", "box"), ("red", "disc"), ("blue", "disc"), ("-", "&")]
    titles = ["Red box", "A box: reds and box", "Discs of the shop, red", "", "a pale disc of no colour"]
    for row, (colour, shape), title in zip(rows, looks, titles, strict=True):
        row |= {"split": "test", "colour": colour, "shape": shape, "title": title}
    manifest, catalogue = write_manifest(tmp_path / "manifest.tsv", rows), tmp_path / "catalogue"
    ingest.run(
        ingest.IngestConfig(
            manifest=manifest, images=tmp_path, out=catalogue, attribute_columns="colour,shape", workers=1
        )
    )
    report = bm25.run(
        bm25.Bm25Config(catalogue=catalogue, query_attributes=("colour", "shape"), bare_titles=("shape",))
    )
    check_report(report)

    words = [["red", "box"], ["a", "box", "red", "and", "box"], ["disc", "of", "the", "shop", "red"], []]
    words.append(["a", "pale", "disc", "of", "no", "colour"])
    mean = sum(map(len, words)) / 5

    def score(query, title):
        total = 0.0
        for word in query:
            holds, often = sum(word in other for other in words), title.count(word)
            rarity = math.log(1 + (5 - holds + 0.5) / (holds + 0.5))
            total += rarity * often / (often + 1.5 * (0.25 + 0.75 * len(title) / mean))
        return total

    wanted = {("red", "disc"): {0, 2}, ("red", "box"): {1}, ("blue", "disc"): {3}, (): {4}}  # '- &' has no words
    first = []
    for query, relevant in wanted.items():
        scores = [score(query, title) for title in words]
        order = sorted(range(5), key=lambda i: (-scores[i], i))
        first.append(min(order.index(i) for i in relevant))
    assert sorted(first) == [0, 1, 4, 4]
    assert report["headline"]["queries"] == 4 and report["headline"]["recall_at_1"] == 0.25
    assert report["headline"]["mrr"] == pytest.approx(sum(1 / (1 + place) for place in first) / 4)
    assert report["headline"]["bare_mrr"] != report["headline"]["mrr"]


def test_bm25_predicts_categories_of_the_nearest_titles():
    """A rare word outweighs two votes of a common one; documents without category neither teach nor are asked; those
    asked do not teach.
    """
    learned = {"title": ["blue sari", "blue shirt", "blue shirt", "red cap", None, "navy sari"]}
    learned["kind"] = ["Saree", "Shirt", "Shirt", "Cap", "Cap", ""]
    asked = {"title": ["blue saris", "a cap", "red shirt", "shirts of navy", "red shirt"]}
    asked["kind"] = ["Saree", "Cap", "Shirt", None, "Cap"]
    found = bm25.nearest(side(learned), side(asked, [10, 11, 12, 13, 14]), "kind")
    assert found["asked"] == 4 and found["knn_accuracy"] == 0.75
    assert found["knn_macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    themselves = {"title": ["blue shirt", "blue shirt"], "kind": ["Saree", "Saree"]}
    assert bm25.nearest(side(learned), side(themselves, [1, 2]), "kind")["knn_accuracy"] == 1.0


def test_a_tower_that_transformers_does_not_read_is_one_line():
    with pytest.raises(UserError, match="--model has 'vit_s'"):
        towers.TowersConfig(model=("vit_s",))


def test_the_plain_script_learns_colours_and_shapes(tmp_path):
    catalogue = make_catalogue(tmp_path, classes=6, queries=8)
    config = plain.PlainConfig(catalogue=catalogue, images=2400, image_size=32, threads=1)
    report = plain.run(config)
    check_report(report)
    (row,) = report["rows"]
    assert (row["queries"], row["documents"]) == (6, 6) and row["recall_at_1_never_trained"] is None
    untrained = plain.run(dataclasses.replace(config, images=1))
    assert report["headline"]["recall_at_1"] > max(0.5, untrained["headline"]["recall_at_1"])


@pytest.mark.full
def test_governance_is_compared_with_the_truth_beside_other_groupings():
    report = governance.run(governance.GovernanceConfig(classes=40, noise=(0.2,)))
    check_report(report)
    assert [row["shop"] for row in report["rows"]] == [governance.TUNED] * 5 + [governance.OTHER] * 5
    tuned = {row["method"]: row for row in report["rows"] if row["shop"] == governance.TUNED}
    precision = {method: row["precision"] for method, row in tuned.items()}
    assert precision["governed"] > precision["without embeddings"] > precision["label propagation"]
    assert precision["label propagation"] > precision["components"]
    for row in tuned.values():
        assert row["reachable_recall"] > 0.9 and row["pairs_of_2_clicks"] > 0.5 and 0.2 < row["wrong_clicks"] < 0.3
    headline = report["headline"]
    assert headline["precision_at_20_noise"] == precision["governed"] > 0.9
    assert headline["recall_at_20_noise_components"] == tuned["components"]["recall"]
    with pytest.raises(UserError, match="belong together"):
        governance.GovernanceConfig(embeddings=("photos.parquet",))


def test_a_click_log_of_a_catalogue_holds_its_classes(tmp_path):
    rows = draw_rows(tmp_path, classes=6, queries=6, size=16, seed=0)
    manifest, catalogue = write_manifest(tmp_path / "manifest.tsv", rows), tmp_path / "catalogue"
    ingest.run(ingest.IngestConfig(manifest=manifest, images=tmp_path, out=catalogue, workers=1))
    config = click_log.ClickLogConfig(catalogue=catalogue, out=tmp_path / "clicks.parquet", noise=0.0)
    report = click_log.run(config)
    check_report(report)
    log = pq.read_table(config.out).to_pandas()
    classes = {row["id"]: row["class_id"] for row in rows}
    right = log["query"].map(classes) == log["document"].map(classes)
    trained = {row["id"] for row in rows if row["kind"] == "query" and row["split"] == "train"}
    assert set(log["query"]) == set(log["query"][right & (log["clicks"] > 0)]) == trained
    wrong = log["clicks"][~right].sum() / log["clicks"].sum()  # on hot documents only
    assert 0 < wrong < 0.5 and report["headline"]["wrong_clicks"] == pytest.approx(wrong)
    assert report["rows"] == [{"queries": 24, "documents": 6, "rows": len(log), "clicks": log["clicks"].sum()}]

    for row in rows:
        row["id"] = row["class_id"]  # photos by the id of their product
    write_manifest(manifest, rows)
    same = tmp_path / "same"
    ingest.run(ingest.IngestConfig(manifest=manifest, images=tmp_path, out=same, workers=1))
    with pytest.raises(UserError, match="photos with the same id"):
        click_log.run(dataclasses.replace(config, catalogue=same))
