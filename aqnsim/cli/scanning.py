"""``aqnsim scan``: the sites of a model that a profile hurts, by measures that need not agree, and which to keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqnsim import profiles
from aqnsim._errors import ConfigError
from aqnsim.cli.output import Section, Table, progress, show, whole_file
from aqnsim.profiles import texts

if TYPE_CHECKING:
    from aqnsim.diagnose import Plan, Scan, Text

SHOWN = ("weight_sqnr_db", "input_sqnr_db", "gradient_snr_db", "kl_only", "loss_only", "kl_without")


def scan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder of transformers, or its hub id.")],
    profile: Annotated[str, typer.Option(metavar="NAME", help="A profile, or path to a TOML file.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text that the model is asked.")],
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 128,
    rank: Annotated[str, typer.Option(metavar="METRIC", help="What the table is sorted by, worst first.")] = "kl_only",
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="No gradients, and no emulation of all sites but one.")
    ] = False,
    keep_bytes: Annotated[
        int | None, typer.Option(help="Keep the worst sites in 16 bits, within so many bytes more.", show_default=False)
    ] = None,
    keep_kl: Annotated[
        float | None,
        typer.Option(help="Keep the worst sites in 16 bits until the KL is at most this.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="NAME.toml", help="Write the profile without the kept sites.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every measure.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the ranked measure, layers by roles.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the profile's noise.")] = 0,
) -> None:
    """Measure how much each site's emulation changes what a model says; keep the worst sites within a budget."""
    from aqnsim import diagnose

    if out is not None and keep_bytes is None and keep_kl is None:
        raise ConfigError("--out writes the profile without the kept sites: give --keep-bytes or --keep-kl, too")
    loaded, asked = _loaded(model, text, windows, length)
    found = diagnose.scan(
        loaded, profiles.load(profile), asked, seed=seed, gradients=not quick, without=not quick, progress=progress
    )
    kept = None
    if keep_bytes is not None or keep_kl is not None:
        kept = diagnose.plan(found, loaded, asked, extra_bytes=keep_bytes, kl=keep_kl, seed=seed)
    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(_finite(to_dict(found, kept)), indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        _draw(found, rank, plot)
    show(*page(found, rank, top), *([] if kept is None else [_kept(kept)]))
    if out is not None and kept is not None:
        if out.suffix != ".toml":
            raise ConfigError(f"--out writes a file that ends in .toml, got {str(out)!r}")
        with whole_file(out) as temporary:
            temporary.write_text(texts.to_toml(kept.profile), encoding="utf-8")
        print(out)


def _loaded(name: str, file: Path, windows: int, length: int) -> tuple[Any, Text]:
    from aqnsim.diagnose import Text

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ConfigError("scan needs transformers to load a model: pip install transformers") from error
    if not file.is_file():
        raise ConfigError(f"--text {file}: no such file")
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokens = AutoTokenizer.from_pretrained(name)(file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    return model, Text(tokens[: windows * length], length)


def to_dict(found: Scan, kept: Plan | None) -> dict[str, Any]:
    """Everything, for JSON."""
    from aqnsim.diagnose import multipliers

    data = found.to_dict()
    if any(s.layer is not None and s.values["input_nmse"] is not None for s in found.sites):
        data["aqn_multipliers"] = {str(k): v for k, v in multipliers(found).items()}
    return data if kept is None else {**data, "plan": kept.to_dict()}


def page(found: Scan, rank: str, top: int) -> list[Section]:
    """The worst sites, and how well the measures agree."""
    ranked = found.ranking(rank)
    columns = [m for m in dict.fromkeys((rank, *SHOWN)) if any(s.values[m] is not None for s in ranked)]
    rows: Table = [("site", *columns)]
    rows += [(s.name, *(_shown(s.values[m]) for m in columns)) for s in ranked[:top]]
    head = (
        f"{found.profile.name} ({found.profile.fingerprint}), {len(found.sites)} sites, {found.tokens} tokens: loss "
        f"{found.loss:.4f} -> {found.whole.loss:.4f}, KL {found.whole.kl:.4g} nats a token; worst first by {rank}"
    )
    agreement: Table = [("measure", "agrees with", "Spearman")]
    agreement += [(a, b, f"{r:.2f}") for (a, b), r in sorted(found.agreement(columns).items(), key=lambda p: p[1])]
    return [Section(head, rows), Section("How the measures rank the sites, from least agreement on", agreement)]


def _kept(plan: Plan) -> Section:
    lines = [
        f"{len(plan.keep)} sites stay in 16 bits, {plan.extra_bytes} bytes more: {', '.join(plan.keep) or 'none'}",
        f"KL {plan.before.kl:.4g} -> {plan.after.kl:.4g}, perplexity {plan.before.perplexity:.4f} -> "
        f"{plan.after.perplexity:.4f}",
    ]
    return Section("Kept", "\n".join(lines))


def _draw(found: Scan, metric: str, path: Path) -> None:
    from aqnsim.diagnose import METRICS
    from aqnsim.report import draw_cells

    cells: dict[tuple[str, str], float] = {}
    for s in found.ranking(metric):
        key = ("-" if s.layer is None else str(s.layer), s.role)
        cells.setdefault(key, s.values[metric] or 0.0)  # of sites that share both, the worst
    draw_cells(cells, f"{METRICS[metric][1]}, {found.profile.name}", path)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _finite(data: Any) -> Any:
    """JSON has no infinity: a site whose cast changed nothing has a signal to noise of null."""
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and data in (float("inf"), float("-inf")) else data
