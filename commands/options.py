"""The options of the command line that commands share, and their types. Heavy imports wait inside the functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..bundle import Pooling
from ..errors import UserError
from ..system.reading import shown

if TYPE_CHECKING:
    from ..pipeline.request import Request

MOST_TOKENS = 1 << 24
"""The largest number of tokens that can be asked for; no model has such a context."""

MOST_SEED = 2**63 - 1

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZES_OF_CALIBRATION = {"tokens": "calibration_tokens", "fisher_windows": "fisher_windows"}


class SizeType(click.ParamType[int]):
    """`180m`, `1.5g`, `64Mi`, or bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmg]?i?)b?", str(value).strip(), re.IGNORECASE)
        if found is None or found[2].lower() not in _SIZES:
            self.fail(f"{shown(value, 60)} is not a size; write 180m, 1.5g or 64Mi", param, ctx)
        return int(float(found[1]) * _SIZES[found[2].lower()])


class DurationType(click.ParamType[float]):
    """`40ms`, `1.5s`, or milliseconds; as milliseconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(ms|s)?", str(value).strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"{shown(value, 60)} is not a time; write 40ms or 1.5s", param, ctx)
        return float(found[1]) * (1000.0 if (found[2] or "").lower() == "s" else 1.0)


class IntList(click.ParamType[tuple[int, ...]]):
    """Comma-separated integers, none below 0."""

    name = "N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", p) for p in parts):
            self.fail(f"{shown(value, 60)} is not a list of numbers; write 0,2048", param, ctx)
        return tuple(int(p) for p in parts)


@dataclass(frozen=True)
class ReportOutput:
    """Where a report goes and as what. path: None is standard output."""

    format: str
    path: Path | None = None


class ReportType(click.ParamType[ReportOutput]):
    """One of some formats, or a file whose name ends in one of them."""

    def __init__(self, *formats: str) -> None:
        self.formats = formats
        self.name = "|".join(formats) + "|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ReportOutput:
        if isinstance(value, ReportOutput):
            return value
        text = str(value)
        if text in self.formats:
            return ReportOutput(text)
        ending = text.rpartition(".")[2].lower() if "." in text else ""
        if ending not in self.formats:
            known = ", ".join(self.formats)
            self.fail(f"{shown(text, 60)} is none of {known}, and no file whose name ends in one of them", param, ctx)
        return ReportOutput(ending, Path(text))


model = click.option("-m", "--model", required=True, metavar="MODEL", help="Directory, .gguf file, or hub id.")
adapter = click.option(
    "--adapter", metavar="DIR", help="Folder of a LoRA adapter (PEFT), which is merged into MODEL's weights."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
strict = click.option(
    "--strict-placement", is_flag=True, help="Exit code 1 if an op fell back to another unit than the target's."
)
against = click.option(
    "--against",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "transformers", "none"]),
    help="Compare how MODEL is read with transformers. auto: where it is installed and knows the model.",
)
pooling = click.option(
    "--pooling",
    default="",
    metavar="NAME[,NAME]",
    callback=lambda _, __, value: _poolings(value),
    help="Of an encoder of texts, in place of what its files say: cls, max, mean, mean_sqrt_len, weighted_mean, last.",
)
threads = click.option(
    *("-t", "--threads"), default=0, show_default="OMP_NUM_THREADS, or all cores", type=click.IntRange(0, 1024)
)
check = click.option(
    "--check/--no-check", default=True, show_default=True, help="First compare the hashes of the files that are read."
)
path = click.Path(path_type=Path)
device_python = click.option(
    "--device-python",
    "python",
    default="python3",
    show_default=True,
    metavar="COMMAND",
    help="What starts Python on a device.",
)


def on_devices(command: Any) -> Any:
    """The options of `profile` for devices behind links."""
    options = [
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="NAME|URL",
            help="Predict for a device of the library ('all': every one), or measure there: ssh://user@host:port, adb, "
            "adb://SERIAL; repeatable.",
        ),
        click.option(
            "--sustain",
            type=click.FloatRange(0, 86400),
            default=0.0,
            metavar="SECONDS",
            help="For --device: go on decoding for so long, until the rate settles.",
        ),
        click.option(
            "--cool-within",
            type=click.FloatRange(0, 86400),
            default=300.0,
            show_default=True,
            metavar="SECONDS",
            help="For --device: before a row wait at most so long for a cool device.",
        ),
        device_python,
        click.option(
            "--resume/--no-resume",
            default=True,
            show_default=True,
            help="For --device: go on with a run that ended early.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def require_no_device_options(given: dict[str, Any]) -> None:
    """Raise UserError for an option of `on_devices` that was given without a device."""
    for name, default in (("sustain", 0.0), ("cool_within", 300.0), ("python", "python3"), ("resume", True)):
        if given[name] != default:
            flag = {"python": "device-python", "resume": "no-resume"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{flag} is for a device behind a link; give --device ssh://user@host, too")


HOLD_OUTS = ("architecture", "device", "device-but-one-model", "nothing")
"""What `devices evaluate` predicts without; each is told by `predict_rows`."""


def _poolings(text: str) -> tuple[str, ...]:
    """The poolings of a comma-separated list. Raises click's error for another."""
    known = get_args(Pooling)
    asked = [part.strip() for part in text.split(",")] if text else []
    for name in asked:
        if name not in known:
            raise click.BadParameter(f"{shown(name, 60)} is none of {', '.join(known)}", param_hint="--pooling")
    return tuple(dict.fromkeys(asked))


def planning(command: Any) -> Any:
    """The options `export` and `plan` share."""
    options = [
        adapter,
        pooling,
        click.option(
            "--format",
            "formats",
            multiple=True,
            metavar="FORMAT",
            help="Target; repeatable. Default: onnx. 'all': every one whose library is here.",
        ),
        click.option("--bits", type=float, help="Budget: average bits a weight, scales counted. Default: 4.5."),
        click.option("--size", type=SizeType(), help="Budget: bytes of the quantized checkpoint, such as 180m."),
        click.option("--latency", type=DurationType(), help="Budget: predicted time of a decode step, such as 40ms."),
        click.option("--energy", type=float, metavar="JOULES", help="Budget: predicted energy of a decode step."),
        click.option(
            "--memory",
            "memory_budget",
            type=SizeType(),
            help="Budget: memory of the weights and of one stream's states at the context, such as 900m.",
        ),
        click.option(
            "--device", metavar="NAME", help="For --latency and --energy: the device (see 'edgewright devices list')."
        ),
        click.option(
            "--sure", is_flag=True, help="For --latency and --energy: keep to them at the slow end of the interval."
        ),
        click.option("--plan", "plan_file", type=path, help="Use this plan instead of allocating."),
        click.option("--override", "overrides", multiple=True, metavar="REGEX=BITS[:GROUP]", help="First match wins."),
        click.option(
            "--widths", type=IntList(), help="Widths to choose from. Default: those every target stores whole."
        ),
        click.option("--group-size", type=click.Choice(["32", "64", "128", "channel"]), help="Fix the group size."),
        click.option(
            "--importance",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "fisher", "kl", "lim", "zd", "zd-two-sided", "uniform"]),
            help="What bits are worth where: measured (fisher, kl) or scored by layer (arXiv 2406.17415). auto: the best "
            "that the data and the memory allow.",
        ),
        click.option(
            "--quantizer",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "rtn", "gptq"]),
            help="auto: gptq where there are calibration data, else rtn.",
        ),
        click.option(
            "--calibration",
            type=path,
            metavar="FILE|none",
            help="Text to calibrate on; verify compares on prompts from it, too. Default: the text that ships, for a language "
            "model whose tokenizer knows it; none: no data.",
        ),
        click.option("--task", type=path, help="Task file (prompt TAB answer | answer): used as --calibration is."),
        click.option("--calibration-tokens", type=click.IntRange(1, 1 << 24), hidden=True),
        click.option("--fisher-windows", type=click.IntRange(1, 1 << 16), hidden=True),
        click.option(
            "--workers",
            type=click.IntRange(1, 1024),
            default=1,
            show_default=True,
            help="Processes for GPTQ and scoring.",
        ),
        click.option("--cluster", metavar="ADDRESS", help="The --workers on a Ray cluster, such as ray://host:10001."),
        click.option(
            "--kv-cache",
            default="float32",
            show_default=True,
            type=click.Choice(["float32", "int8"]),
            help="Stored as.",
        ),
        click.option("--memory-limit", type=SizeType(), help="Most anonymous memory to take, such as 4g."),
        click.option(
            "--num-layers", type=click.IntRange(max=1 << 20), help="Only the first N layers of each stack: a rehearsal."
        ),
        click.option(
            "--max-context",
            type=click.IntRange(max=MOST_TOKENS),
            help="Tokens a prompt and its answer may take. Default: at most 4096.",
        ),
        *_target_options(),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _target_options() -> list[Any]:
    """A target's own option, of each that has one."""
    from ..targets.registry import TARGETS

    own = [target.option for target in TARGETS.values() if target.option is not None]
    kinds: dict[str, dict[str, Any]] = {
        "numbers": {"type": IntList()},
        "names": {"multiple": True, "metavar": "CONFIG"},
        "version": {"metavar": "VERSION"},
    }
    return [click.option(o.flag, help=o.help, **kinds[o.kind]) for o in own]


def _own_choices(options: dict[str, Any]) -> dict[str, tuple[int, ...] | tuple[str, ...]]:
    """What was given of the targets' own options, by target."""
    from ..targets.registry import TARGETS

    flags = {name: target.option.flag for name, target in TARGETS.items() if target.option is not None}
    given = {name: options[flag.removeprefix("--").replace("-", "_")] for name, flag in flags.items()}
    return {name: (values,) if isinstance(values, str) else values for name, values in given.items() if values}


def request(model: str, options: dict[str, Any], note: Callable[[str], None]) -> Request:
    """What the options of `planning` ask for; `note` is told of targets left out. Raises UserError for contradictions."""
    from ..pipeline.request import BudgetOptions, CalibrationOptions, CheckOptions, Request, TargetOptions
    from ..quant.overrides import Override
    from ..quant.plan import BitPlan
    from ..system.workers import Workers
    from ..targets.registry import choose

    formats, left_out = choose(options["formats"])
    for line in left_out:
        note(line)
    group = options["group_size"]
    plan_file: Path | None = options["plan_file"]
    given = options | {"memory": options["memory_budget"]}
    budgets = [name for name in ("bits", "size", "latency", "energy", "memory") if given[name] is not None]
    if plan_file is not None and (budgets or options["overrides"]):
        raise UserError(
            "--plan already says the bits; leave out --bits, --size, --latency, --energy, --memory and --override"
        )
    if plan_file is not None and (options["widths"] is not None or group is not None):
        raise UserError("--plan already says widths and groups; leave out --widths and --group-size")
    text: Path | None = options["calibration"]
    shipped = text is None and options["task"] is None
    text = None if text is not None and str(text) == "none" else text
    if text is not None and options["task"] is not None:
        raise UserError("--calibration and --task both give the prompts; choose one")
    if len(budgets) > 1:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in budgets)} are budgets, and there is one; give one of them"
        )
    on_device = next((name for name in ("latency", "energy") if options[name] is not None), None)
    if (on_device is None) != (options["device"] is None):
        what = "an energy" if on_device == "energy" else "a time"
        raise UserError(f"--{on_device or 'latency'} is {what} on a device, --device says which; give both or neither")
    if options["sure"] and on_device is None:
        raise UserError("--sure is of a prediction; give --latency or --energy with --device, too")
    if options["energy"] is not None and not 0 < options["energy"] < 1e6:
        raise UserError(f"--energy {options['energy']:g}: give joules above 0")
    if options["cluster"] is not None and options["workers"] == 1:
        raise UserError("--cluster needs --workers N as well: how many pieces at once, 2 or more")
    return Request(
        model=model,
        adapter=options["adapter"],
        pooling=options["pooling"],
        budget=BudgetOptions(
            bits=options["bits"],
            size=options["size"],
            latency_ms=options["latency"],
            device=options["device"],
            sure=options["sure"],
            joules=options["energy"],
            memory=options["memory_budget"],
            plan=BitPlan.read(plan_file) if plan_file is not None else None,
            overrides=tuple(Override.parse(text) for text in options["overrides"]),
            widths=options["widths"],
            groups=(32, 64, 128) if group is None else (0,) if group == "channel" else (int(group),),
            importance=options["importance"],
        ),
        calibration=CalibrationOptions(
            text=text,
            shipped=shipped,
            task=options["task"],
            quantizer=options["quantizer"],
            norms=options.get("norms", "tuned"),
            **{key: options[name] for key, name in _SIZES_OF_CALIBRATION.items() if options[name]},
        ),
        targets=TargetOptions(
            formats=formats,
            kv_cache=options["kv_cache"],
            own=_own_choices(options),
        ),
        checks=CheckOptions(
            verify=not options.get("no_verify", False),
            strict_placement=options.get("strict_placement", False),
            against=options.get("against", "none"),
        ),
        num_layers=options["num_layers"],
        max_context=options["max_context"],
        memory_limit=options["memory_limit"],
        workers=Workers(options["workers"], options["cluster"]),
    )
