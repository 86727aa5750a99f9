"""`shelfmark govern`: Turn a catalogue's samples into training classes.

The rules are relational queries, written once as Ibis expressions (harness/catalogue/governance/). Every result leaves
the engine as a Parquet file, so that memory does not grow with the catalogue.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import ALL_SPLITS, Catalogue, nearest_first
from harness.catalogue.classes import GOVERNANCE_FORMAT, order_id
from harness.catalogue.governance import class_column, click_classes
from harness.catalogue.governance.config import COMMON, GovernConfig
from harness.catalogue.governance.engine import failing_clearly
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.files import write_json
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder

EXAMPLE = "shelfmark govern catalogues/products --split train --min-queries 2"


def run(config: GovernConfig) -> dict[str, Any]:
    """Governs the catalogue and prints a summary.

    Returns:
        num_classes, tail_classes, queries, documents, query_slots, document_slots, quarantined_classes,
        quarantined_samples (those without class), largest_class, order_id; with clicks more (docs/governance.md).

    Raises:
        UserError: an option out of range, an unknown or empty split, a table that cannot be used, or no class large
            enough.
    """
    _check_options(config)
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue, folders=("pairs",))
    _check_split(catalogue, config.split)
    with failing_clearly(catalogue.path), staged_folder(catalogue.path / "classes", replace=True) as stage:
        summary = _govern(catalogue, config, stage)
    largest = summary["largest_class"]
    print(
        f"{config.catalogue}/classes: {summary['num_classes']:,} classes of {summary['queries']:,} queries and "
        f"{summary['documents']:,} documents; {summary['tail_classes']:,} (tail) have fewer queries than the median\n"
        f"an epoch shows {summary['query_slots']:,} queries and {summary['document_slots']:,} documents; the largest "
        f"class is {largest['class_key']!r} with {largest['query_members']:,} and {largest['document_members']:,}\n"
        f"not trained: {summary['quarantined_classes']:,} classes with too few queries or documents, "
        f"{summary['quarantined_samples']:,} samples without a class (classes/quarantine.parquet has them)"
    )
    if (held := summary.get("held_out", {})).get("samples"):
        print(f"held out: {held['classes']:,} classes, {held['samples']:,} samples (classes/held_out.parquet)")
    if config.clicks is not None:
        print(f"{_told(summary)}\nreport: {config.catalogue}/classes/report.html")
    if summary["num_classes"] == 1:
        print("There is one class only: training has nothing to tell apart. Check ingest's --class-column")
    return summary


def _told(summary: dict[str, Any]) -> str:
    """Lines on the result of the rules on clicks."""

    def listed(figures: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in figures.items())

    lines = [
        f"rows of the log: {listed(summary['rows'])}",
        f"edges: {listed(summary['edges'])}",
        f"components: {listed(summary['components'])}",
        f"{summary['purity']:.1%} of the clicks of the classes' queries fall into their class",
        f"compared with the previous classes: {listed(summary['history'])}",
    ]
    if backwards := summary["rows_backwards"]:
        lines.append(f"{backwards:,} rows are older than the row above them; the order of the rows does not matter")
    return "\n".join(lines)


def _govern(catalogue: Catalogue, config: GovernConfig, stage: Path) -> dict[str, Any]:
    """Writes the files of classes/ into `stage`; returns the summary."""
    spill = stage / "spill"
    spill.mkdir()
    source = class_column if config.clicks is None else click_classes
    summary = source.write(catalogue, config, stage, spill)
    shutil.rmtree(spill)
    summary["order_id"] = order_id(stage)
    without = ("catalogue", "engine", "master", "memory", "rows_backwards")
    options = {
        name: value
        for name, value in asdict(config).items()
        if name in COMMON or (config.clicks is not None and name not in without)
    }
    recorded = {name: value for name, value in summary.items() if name not in without}
    governance = {"format": GOVERNANCE_FORMAT, **recorded, "options": options}
    write_json(stage / "governance.json", governance)
    if config.clicks is not None:
        from harness.evaluate.class_page import write_report  # here: pictures need torch

        write_report(catalogue, stage, governance)
    write_manifest(stage)
    return summary


def _check_options(config: GovernConfig) -> None:
    """Raises UserError for options that have no effect without --clicks."""
    known = ("catalogue", "clicks", "memory", *COMMON)
    own = [field for field in fields(config) if field.name not in known]
    given = [f"--{field.name.replace('_', '-')}" for field in own if getattr(config, field.name) != field.default]
    if config.clicks is None and given:
        raise UserError(f"classes of the class column have no use for {', '.join(given)}", "Name a click log: --clicks")


def _check_split(catalogue: Catalogue, split: str) -> None:
    splits: dict[str, int] = catalogue.meta["counts"]["splits"]
    # A catalogue without splits belongs to every split; in others an unknown name is a mistake.
    if split not in splits and set(splits) != {ALL_SPLITS}:
        there = ", ".join(f"{name} ({splits[name]:,})" for name in nearest_first(split, splits))
        raise UserError(f"no sample of {catalogue.path} is in split {split!r} (--split)", f"The splits are {there}")
