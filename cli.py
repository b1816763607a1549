"""The command line: parse, call one function, print. Nothing imports this file; heavy imports wait inside the commands.

Standard output carries the result alone, progress and notes go to standard error. A user's mistake is one line and exit
code 2, a failed verification exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .commands import generation_options
from .commands import options as cli_options
from .commands.exit_codes import Commands, cleaning_up, note
from .commands.help import SHELLS, completion_script
from .errors import UserError
from .system.reading import printable
from .system.version import __version__

if TYPE_CHECKING:
    from .pipeline.planned import Planned


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgewright")
def main() -> None:
    """Compile small language models for devices: quantize once, lower to every runtime, verify, profile, run."""
    # Texts are encoded one by one; a library that has used threads warns at every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@main.command()
@cli_options.model
@cli_options.planning
@click.option("-o", "--output", type=cli_options.path, help="The bundle to write; must not exist.")
@click.option("--dry-run", is_flag=True, help="Plan and print, write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip reloading and comparing the artefacts.")
@click.option(
    "--norms",
    default="tuned",
    show_default=True,
    type=click.Choice(["tuned", "kept"]),
    help="tuned: to gptq's codes, on its calibration data, where that helps on data apart.",
)
@cli_options.strict
@cli_options.against
@cli_options.as_json
def export(model: str, output: Path | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Compile MODEL into a bundle.

    A run that ends early keeps the codes that calibration found and the targets that are finished, hidden beside the bundle: the
    same command goes on from there.
    """
    from . import compiler
    from .reports import plan as plan_report
    from .reports import verify as verify_report
    from .targets.registry import require

    request = cli_options.request(model, options, note)
    if options["strict_placement"] and options["no_verify"]:
        raise UserError("--strict-placement judges what --no-verify skips; leave one of them out")
    if dry_run:
        for name in request.formats:
            require(name)
        planned = compiler.plan(request, note)
        _print(plan_report.plan_json(planned), plan_report.plan_text(planned), as_json)
        return
    if output is None:
        raise UserError("say where the bundle goes: -o BUNDLE (or --dry-run)")
    with cleaning_up():
        exported = compiler.export(request, output, note)
    _print(verify_report.export_json(exported), verify_report.export_text(exported), as_json)


@main.command()
@cli_options.model
@cli_options.planning
@click.option("-o", "--output", type=cli_options.path, help="Write the plan as JSON.")
@click.option(
    "--plot",
    type=cli_options.path,
    help="Draw scores and bits, or the frontier, to this PNG or SVG (needs matplotlib).",
)
@click.option(
    "--frontier", "ladder", is_flag=True, help="Many budgets: predicted loss against bytes, uniform beside it."
)
@cli_options.as_json
def plan(model: str, output: Path | None, plot: Path | None, ladder: bool, as_json: bool, **options: Any) -> None:
    """Allocate bits to MODEL's weights."""
    from . import compiler
    from .reports import plan as plan_report
    from .reports import plots
    from .system.writing import write_file

    if ladder:
        if output is not None:
            raise UserError("--frontier is many plans and -o writes one; take --bits or --size from its table, then -o")
        if options["plan_file"] is not None or options["latency"] is not None:
            raise UserError("--frontier makes its own plans, of bytes; leave out --plan and --latency")
    planned = compiler.plan(cli_options.request(model, options, note), note)
    if ladder:
        _frontier(planned, plot, as_json)
        return
    if output is not None:
        write_file(output, planned.plan.to_json())
        note(f"wrote {output}")
    if plot is not None:
        plots.plot_plan(planned, plot)
        note(f"wrote {plot}")
    _print(plan_report.plan_json(planned), plan_report.plan_text(planned), as_json)


def _frontier(planned: Planned, plot: Path | None, as_json: bool) -> None:
    from .quant.frontier import frontier
    from .reports import plan as plan_report
    from .reports import plots

    problem = planned.problem
    if problem is None:
        raise UserError("--frontier makes its own plans; leave out --plan")
    plans = frontier(problem, asked=(planned.plan.budget,))
    if plot is not None:
        plots.plot_frontier(plans, str(planned.config["model_type"]), plot)
        note(f"wrote {plot}")
    _print(plan_report.frontier_json(plans), plan_report.frontier_text(plans), as_json)


@main.command()
@cli_options.model
@click.option(
    "--eugen",
    metavar="REGEX:m=M,k=K",
    help=r"Feed-forward blocks whose path matches become EUGens (arXiv 2601.22563), such as 'layers\.3\.mlp:m=256,k=2'.",
)
@click.option(
    "--smooth",
    is_flag=True,
    help="Scale the inputs of linears by their activations, folded into what is before them (arXiv 2306.00978).",
)
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="For --smooth: the codes that the scales are chosen for. Default: 4.",
)
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128", "channel"]),
    help="For --smooth: inputs that share a scale. Default: 64.",
)
@click.option(
    "--calibration",
    type=cli_options.path,
    help="For --eugen and --smooth: a text, or a task file (.tsv), to calibrate on.",
)
@click.option(
    "--adapt", is_flag=True, help="A decoder-only Gemma becomes an encoder-decoder to be trained (arXiv 2504.06225)."
)
@click.option("--decoder", metavar="MODEL", help="For --adapt: another checkpoint for the decoder.")
@click.option("--seed", type=click.IntRange(0, cli_options.MOST_SEED), default=0, show_default=True)
@click.option("-o", "--output", type=cli_options.path, required=True, help="The checkpoint to write; must not exist.")
@cli_options.as_json
def rewrite(model: str, eugen: str | None, smooth: bool, adapt: bool, as_json: bool, **options: Any) -> None:
    """Change MODEL into another checkpoint, which exports as any other."""
    if (eugen is not None) + smooth + adapt != 1:
        raise UserError("say what to change: --eugen REGEX:m=M,k=K, --smooth or --adapt, one of them")
    calibration: Path | None = options["calibration"]
    if adapt and calibration is not None:
        raise UserError("--calibration is for --eugen and --smooth; --adapt reads no text")
    if not smooth and (options["bits"] is not None or options["group_size"] is not None):
        raise UserError("--bits and --group-size are for --smooth; 'export' says the bits of a model")
    from .reports import rewrite as rewrite_report

    output, seed = options["output"], options["seed"]
    if adapt:
        from .rewrites.adapt import adapt as initialise

        adapted = initialise(model, options["decoder"], output, seed, note)
        _print(rewrite_report.adapted_json(adapted), rewrite_report.adapted_text(adapted), as_json)
        return
    if options["decoder"] is not None:
        raise UserError("--decoder is for --adapt")
    if calibration is None:
        why = "--eugen fits the blocks on text" if eugen is not None else "--smooth measures activations on text"
        raise UserError(f"{why}: give --calibration FILE")
    if eugen is None:
        from .rewrites.smooth import rewrite_smooth

        group = 0 if options["group_size"] == "channel" else int(options["group_size"] or 64)
        smoothed = rewrite_smooth(model, calibration, output, int(options["bits"] or 4), group, note)
        _print(smoothed.to_json(), rewrite_report.smooth_text(smoothed), as_json)
        return
    from .rewrites.eugen.rewrite import rewrite_eugen

    report = rewrite_eugen(model, eugen, calibration, output, seed, note)
    _print(report.to_json(), rewrite_report.eugen_text(report), as_json)


@main.command()
@click.argument("bundle", type=cli_options.path)
@click.option("-m", "--model", metavar="MODEL", help="The original checkpoint, for the quantization loss.")
@cli_options.adapter
@click.option("--task", type=cli_options.path, help="Task file: exact-match accuracy of the artefact and the original.")
@click.option("--task-limit", type=click.IntRange(1, 1 << 32), help="Only the first N lines of the task file.")
@click.option(
    "--text",
    type=cli_options.path,
    help="Text file: perplexity, KL and top-1 agreement of the artefact and the original.",
)
@click.option("--text-windows", type=click.IntRange(1, 4096), help="Windows of --text to score. Default: 16.")
@click.option("--format", "formats", multiple=True, metavar="FORMAT", help="Only this target; repeatable.")
@cli_options.strict
@cli_options.against
@cli_options.threads
@cli_options.as_json
def verify(bundle: Path, text_windows: int | None, strict_placement: bool, as_json: bool, **options: Any) -> None:
    """Check every artefact of BUNDLE against its reference."""
    from .reports import verify as verify_report
    from .verification.report import require, require_placement
    from .verification.verify import TEXT_WINDOWS, VerifyOptions
    from .verification.verify import verify as check

    if text_windows is not None and options["text"] is None:
        raise UserError("--text-windows says how much of a text is scored; give --text FILE")
    if options["adapter"] is not None and options["model"] is None:
        raise UserError("--adapter is merged into the original checkpoint; give -m MODEL, too")
    report = check(bundle, VerifyOptions(text_windows=text_windows or TEXT_WINDOWS, **options), note)
    with _keeping(bundle, "verify", report.to_json()):
        _print(report.to_json(), verify_report.verify_text(report), as_json)
    require(report)
    if strict_placement:
        require_placement(report)


@main.command()
@click.argument("bundle", type=cli_options.path)
@click.option("--prompt", help="The prompt; '-' reads standard input.")
@click.option(
    "--embed", is_flag=True, help="The vector of the prompt, as a line of JSON; of standard input one of each line."
)
@click.option("--texts", type=cli_options.path, metavar="FILE", help="For --embed: a file of texts, one a line.")
@click.option(
    "--prompt-name", metavar="NAME", help="For --embed: a prompt of the model's own before each text, such as query."
)
@click.option(
    "-o", "--output", type=cli_options.path, metavar="FILE.npy", help="For --embed: all vectors as one array."
)
@click.option("--audio", type=cli_options.path, metavar="FILE", help="A sound to write down (WAV, FLAC, Ogg, MP3 …).")
@click.option(
    "--language", metavar="CODE", help="For --audio: the language spoken, such as de. Default: what is heard."
)
@click.option("--translate", is_flag=True, help="For --audio: write it down in English.")
@click.option("--timestamps", is_flag=True, help="For --audio: a line for each segment, with its times.")
@click.option(
    "--context", type=cli_options.path, metavar="FILE", help="Text that a decoder-decoder reads first, into its memory."
)
@click.option("--memory", type=cli_options.path, metavar="FILE", help="The memory of a context read before.")
@click.option("--save-memory", type=cli_options.path, metavar="FILE", help="Keep the memory of --context here.")
@click.option(
    "--target-language", metavar="TOKEN", help="The token that a translation begins with: fra_Latn, fr_XX, __fr__ …"
)
@click.option("--chat/--no-chat", default=None, help="Use the chat template. Default: when the tokenizer has one.")
@generation_options.generation
@click.option("--answers", type=click.IntRange(1, 1024), default=1, show_default=True, help="So many answers.")
@click.option("--show-prompt", is_flag=True, help="Say what the model reads.")
@click.option("--format", metavar="FORMAT", help="The target to run. Default: the bundle's first.")
@cli_options.threads
@cli_options.check
@cli_options.as_json
def run(
    bundle: Path,
    prompt: str | None,
    audio: Path | None,
    context: Path | None,
    chat: bool | None,
    embed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer a prompt, or write a sound down, streaming to standard output; why it stopped and how fast it was goes to standard
    error. With --embed print vectors of texts.

    A decoder-decoder answers from --context, or from the --memory it made of one: a second question costs no second reading.
    """
    vectors = {name: options.pop(name) for name in ("texts", "prompt_name", "output")}
    if embed:
        _embed(bundle, prompt, vectors, options | {"context": context, "chat": chat, "audio": audio})
        return
    for name, value in vectors.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --embed, which makes vectors of texts; give that, too")
    if (prompt is None) == (audio is None):
        raise UserError("say what to answer: --prompt TEXT, or a sound to write down: --audio FILE; one of them")
    speech = generation_options.speech_given(options, audio is not None)
    from .checkpoints.chat_template import start_early

    if audio is None and chat is not False:
        start_early(bundle / "checkpoint")  # in another process, while this one imports the rest
    from .commands.run import RunOptions, run_prompt
    from .system.reading import MEBIBYTE, read_stream, read_text

    asked = RunOptions(
        speech=speech,
        sampling=generation_options.sampling_given(options),
        chat=generation_options.chat_given(options, chat),
        context=None if context is None else read_text(context, 256 * MEBIBYTE),
        **options,
    )
    terminal = sys.stdout.isatty()  # a token may be an escape sequence
    if audio is not None:
        from .commands.run_sound import json_of, run_sound, text_of

        spoken = run_sound(bundle, audio, asked)
        if as_json:
            click.echo(json.dumps(json_of(spoken), indent=1))
            return
        for piece in text_of(spoken, speech.timestamps):
            click.echo(printable(piece) if terminal else piece, nl=False)
        click.echo()
        return
    text = read_stream(sys.stdin.buffer, "standard input", 16 * MEBIBYTE) if prompt == "-" else prompt
    results = []
    for said in run_prompt(bundle, text or "", asked, note):
        pieces = []
        for piece in said.answer:
            if as_json:
                pieces.append(piece)
            else:
                click.echo(printable(piece) if terminal else piece, nl=False)
        if as_json:
            results.append(said.to_json("".join(pieces)))
            continue
        click.echo()
        note(said.line())
    if as_json:
        click.echo(json.dumps({"answers": results}, indent=1))


@main.command()
@click.argument("bundle", type=cli_options.path)
@click.option("--context", type=cli_options.path, metavar="FILE", help="Text that a decoder-decoder reads first.")
@generation_options.generation
@click.option("--format", metavar="FORMAT", help="The target to run. Default: the bundle's first.")
@cli_options.threads
@cli_options.check
def chat(bundle: Path, context: Path | None, format: str | None, threads: int, check: bool, **options: Any) -> None:
    """Talk with BUNDLE, turn by turn; what it has read is not read again. /help lists the commands of the chat."""
    from dataclasses import replace

    from .commands.chat import Turns, seed_of, typed_lines
    from .runtimes.answer import Stops
    from .runtimes.conversation import Conversation
    from .runtimes.text_generation import open_bundle
    from .system.reading import MEBIBYTE, read_text

    given = generation_options.sampling_given(options)
    asked = generation_options.chat_given(options, None)
    opened = open_bundle(bundle, format, threads, check)
    sampling = replace(opened.default_sampling(seed_of(options["seed"])), **given)
    stops = Stops(tuple(options["stops"]), opened.token_ids(options["stop_tokens"]))
    memory = None if context is None else opened.read_context(read_text(context, 256 * MEBIBYTE))
    if opened.session.stand_in:
        note(opened.session.how)
    if not opened.tokenizer.templates:
        note("the tokenizer has no chat template: each line is a prompt of its own")
    if not sampling.greedy:
        note(f"seed {sampling.seed}")
    conversation = Conversation(opened, asked, memory, options["max_new_tokens"])
    terminal = sys.stdout.isatty()

    def write(piece: str) -> None:
        click.echo(printable(piece) if terminal else piece, nl=False)

    Turns(conversation, sampling, stops, write, note).run(typed_lines())


@main.command()
@click.argument("bundle", type=cli_options.path)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--api-key", metavar="KEY", envvar="EDGEWRIGHT_API_KEY", help="What clients must send; or EDGEWRIGHT_API_KEY."
)
@click.option("--name", metavar="NAME", help="The model's name. Default: the bundle's folder.")
@click.option(
    "--waiting", type=click.IntRange(1, 1 << 16), default=256, show_default=True, help="Requests that may wait."
)
@generation_options.templates
@click.option("--format", metavar="FORMAT", help="The target to run. Default: the bundle's first.")
@cli_options.threads
@cli_options.check
def serve(bundle: Path, **options: Any) -> None:
    """Serve BUNDLE over HTTP as OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, with streaming."""
    from .commands.serve import ServeOptions
    from .commands.serve import serve as answer

    chat = generation_options.chat_given(options, None)
    answer(bundle, ServeOptions(chat=chat, **options), note)


def _embed(bundle: Path, prompt: str | None, vectors: dict[str, Any], options: dict[str, Any]) -> None:
    """`run --embed`."""
    from .commands.embed import MOST_BYTES, EmbedOptions, lines_of, run_embed
    from .system.reading import read_stream, read_text

    given = [name for name in _GENERATING if options[name] not in (None, (), False, 1)]
    if given:
        flag = given[0].removesuffix("s") if given[0] in ("stops", "stop_tokens", "template_args") else given[0]
        raise UserError(f"--{flag.replace('_', '-')} is for a model that generates; leave it out of --embed")
    file: Path | None = vectors.pop("texts")
    if (prompt is None) == (file is None):
        raise UserError("--embed takes one of --prompt TEXT and --texts FILE")
    if file is not None:
        texts = lines_of(read_text(file, MOST_BYTES), str(file))
    elif prompt == "-":
        texts = lines_of(read_stream(sys.stdin.buffer, "standard input", MOST_BYTES), "standard input")
    else:
        texts = [prompt or ""]
    shared = {name: options[name] for name in ("format", "threads", "check")}
    for line in run_embed(bundle, texts, EmbedOptions(**shared, **vectors), note):
        click.echo(line)


_GENERATING = (
    *(
        "context",
        "memory",
        "save_memory",
        "target_language",
        "max_new_tokens",
        "seed",
        "stops",
        "stop_tokens",
        "answers",
    ),
    *("template", "template_args", "system", "tools", "chat", "show_prompt", *generation_options.SAMPLING),
    *("audio", "language", "translate", "timestamps"),
)


@main.command()
@click.argument("bundle", type=cli_options.path, required=False)
@click.option("-m", "--model", help="In place of BUNDLE, for predictions: a checkpoint; its config.json is enough.")
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True, help="For -m: of all weights.")
@click.option(
    "-p",
    "prompts",
    type=cli_options.IntList(),
    help="Prompt lengths (pp rows). Default: 512, or what the context holds.",
)
@click.option(
    "-n",
    "new",
    type=click.IntRange(0, cli_options.MOST_TOKENS),
    help="Tokens to generate (tg rows). Default: 128, or what fits.",
)
@click.option(
    "-d", "depths", type=cli_options.IntList(), default="0", show_default=True, help="Context depths of the tg rows."
)
@click.option("-r", "repeats", type=click.IntRange(max=10**6), default=5, show_default=True)
@click.option(
    "-o",
    "output",
    type=cli_options.ReportType("md", "json", "csv", "html"),
    default="md",
    show_default=True,
    help="The form of the result, or a file that ends so; html is one page with charts.",
)
@click.option("--format", "formats", multiple=True, metavar="FORMAT", help="Only this target; repeatable.")
@cli_options.on_devices
@cli_options.threads
@cli_options.check
def profile(
    bundle: Path | None,
    model: str | None,
    bits: int,
    formats: tuple[str, ...],
    new: int | None,
    output: cli_options.ReportOutput,
    devices: tuple[str, ...],
    threads: int,
    check: bool,
    **options: Any,
) -> None:
    """Measure BUNDLE on this machine or on devices behind links, or predict it for devices of the library (--device).

    llama-bench rows, load times, memory, time by op and by layer; vendors' estimates stand beside. -o report.html is one page.
    """
    from .commands.profile import ProfileLengths
    from .commands.profile import profile as measure
    from .measuring.links import is_link
    from .reports.profile import profile_text

    lengths = {name: options.pop(name) for name in ("prompts", "depths", "repeats")}
    if (bundle is None) == (model is None):
        raise UserError("give a BUNDLE, or with --device NAME a checkpoint: -m MODEL")
    if bundle is None or (devices and not any(is_link(device) for device in devices)):
        from .commands.predict import predict_bundle, predict_model
        from .reports.prediction import prediction_text

        cli_options.require_no_device_options(options)
        asked = ProfileLengths(new=new, **lengths)
        if bundle is not None:
            predicted = predict_bundle(bundle, devices, formats, asked)
        elif model is not None and devices:
            predicted = predict_model(model, devices, formats, bits, asked)
        else:
            raise UserError("-m MODEL is predicted, not measured; give --device NAME, or all")
        result = predicted.as_json()
        if output.format == "html" and bundle is not None:
            names = list(dict.fromkeys(row["device"] for row in result["rows"]))
            _give(_page(bundle, names=names, prediction=result), output)
            return
        if output.format == "html":
            from .reports.page.model_page import model_html

            _give(model_html(result), output)
            return
        _give(prediction_text(result, output.format), output)
        return
    if devices:
        from .commands.profile_devices import profile_devices, require_links
        from .measuring.measure import DeviceResult, Settings
        from .reports.measured import measured_json, measured_text

        require_links(devices)
        if formats not in ((), ("onnx",)):
            raise UserError("--device measures the onnx artefact; leave --format out")
        settings = Settings(threads=threads, **options)
        results: list[DeviceResult] = []
        try:
            results.extend(profile_devices(bundle, devices, ProfileLengths(new=new, **lengths), settings, note, check))
        finally:
            if results:  # those before a device that fails, too
                with _keeping(bundle, "devices", {"devices": measured_json(results)}):
                    html = output.format == "html"
                    _give(_page(bundle, linked=results) if html else measured_text(results, output.format), output)
        return
    cli_options.require_no_device_options(options)
    measured = measure(bundle, formats, ProfileLengths(new=new, **lengths), threads, check)
    with _keeping(bundle, "profile", measured):
        html = output.format == "html"
        _give(_page(bundle, measured=measured) if html else profile_text(measured, output.format), output)


@main.command()
@click.argument("bundles", nargs=-1, required=True, type=cli_options.path, metavar="BUNDLE…")
@click.option(
    "-o",
    "output",
    type=cli_options.ReportType("text", "md", "csv", "json", "html"),
    default="text",
    show_default=True,
    help="The form of the result, or a file that ends so; html is one page with charts.",
)
def compare(bundles: tuple[Path, ...], output: cli_options.ReportOutput) -> None:
    """Bundles side by side: size, quality, speed and placement, as their manifests and last reports say."""
    from .commands.compare import compare as look
    from .reports.compare import compare_report

    rows = look(bundles)
    if output.format == "html":
        from .reports.page.compare_page import compare_html

        _give(compare_html(rows), output)
        return
    _give(compare_report(rows, output.format), output)


@main.group()
def devices() -> None:
    """The device profiles: what a device can do, and where each number comes from."""


@devices.command("list")
@cli_options.as_json
def devices_list(as_json: bool) -> None:
    """Name the known devices: chip, memory, units, and the targets that they run."""
    from .device_profiles.profile import list_profiles
    from .reports.devices import device_rows, devices_text

    rows = device_rows(list_profiles())
    _print(rows, devices_text(rows), as_json)


@devices.command("show")
@click.argument("name")
@cli_options.as_json
def devices_show(name: str, as_json: bool) -> None:
    """Print a profile as TOML, each number with its source."""
    from .device_profiles.profile import load
    from .reports.devices import device_text

    device = load(name)
    _print(device.model_dump(mode="json"), device_text(device), as_json)


@devices.command("schema")
def devices_schema() -> None:
    """Print the JSON schema of a profile."""
    from .device_profiles.profile import DeviceProfile

    click.echo(json.dumps(DeviceProfile.model_json_schema(), indent=1))


@devices.command("measure")
@click.option(
    "-o", "--output", type=cli_options.path, help="Write the profile here. Default: the user's device folder."
)
@click.option("--seconds", type=float, default=20.0, show_default=True)
@click.option(
    "--models", is_flag=True, help="Run small models of random weights, too: minutes; predictions then rest on them."
)
def devices_measure(output: Path | None, seconds: float, models: bool) -> None:
    """Measure this machine's bandwidth and peak rates and write its profile."""
    from .device_profiles.measure_host import measure_host
    from .device_profiles.profile import save, to_toml, user_path

    host = measure_host(seconds, note)
    target = output or user_path(host.name)
    save(host, target)
    note(f"wrote {target}")
    if models:
        from .commands.measure_models import measure_models

        note(f"wrote {measure_models(host.name, note)}")
    click.echo(to_toml(host).rstrip("\n"))


@devices.command("evaluate")
@click.option("--data", type=cli_options.path, help="Rows to predict, as CSV. Default: those that ship.")
@click.option("--models", type=cli_options.path, help="Sizes of models that are not in the shipped table, as CSV.")
@click.option("--hold-out", type=click.Choice(cli_options.HOLD_OUTS), default="architecture", show_default=True)
@cli_options.as_json
def devices_evaluate(data: Path | None, models: Path | None, hold_out: str, as_json: bool) -> None:
    """Predict published speeds without the rows they are in, and say how far off that is."""
    from .commands.devices import evaluate
    from .reports.evaluation import evaluation_text

    found = evaluate(data, models, hold_out)
    whole = {"hold_out": hold_out, "summary": found.summary, "left_out": found.left_out, "rows": found.rows}
    _print(whole, evaluation_text(found.summary, hold_out, found.left_out), as_json)


@devices.command("calibrate")
@click.option(
    "--data", type=cli_options.path, required=True, help="Measured rows, as CSV; docs/devices.md has the columns."
)
@click.option("--models", type=cli_options.path, help="Sizes of models that are not in the shipped table, as CSV.")
@click.option(
    "-o", "--output", type=cli_options.path, help="Write the costs here. Default: where predictions read them."
)
def devices_calibrate(data: Path, models: Path | None, output: Path | None) -> None:
    """Fit the costs that predictions use to rows of your own, beside those that ship."""
    from .commands.devices import recalibrate

    path, used = recalibrate(data, models, output)
    click.echo(f"{path}: costs from the published rows and {used} of {data}")


@main.command()
@click.argument("target", metavar="MODEL|BUNDLE")
@cli_options.adapter
@cli_options.as_json
def inspect(target: str, adapter: str | None, as_json: bool) -> None:
    """Say what a checkpoint or a bundle holds."""
    from .commands.inspect import inspect as look
    from .reports.inspect import inspect_text

    contents = look(target, adapter)
    _print(contents, inspect_text(contents), as_json)


@main.command()
@click.option("--device", metavar="URL", help="Look at this device instead: ssh://user@host, adb, adb://SERIAL.")
@cli_options.device_python
@cli_options.as_json
def doctor(device: str | None, python: str, as_json: bool) -> None:
    """Say which targets work here, which do not, why, and how to get them; or what a device has to be measured on."""
    from .commands.doctor import doctor as examine
    from .commands.doctor import doctor_text

    if device is not None:
        from .commands.doctor_device import doctor_device, doctor_device_text
        from .commands.profile_devices import require_links

        require_links([device])
        found = doctor_device(device, python, note)
        _print(found, doctor_device_text(found), as_json)
        return
    state = examine()
    _print(state, doctor_text(state), as_json)


@contextmanager
def _keeping(bundle: Path, name: str, report: Mapping[str, object]) -> Iterator[None]:
    """Print the result within this context; then its report is kept in the bundle, where that can be written."""
    from .bundle import Bundle

    try:
        yield
    finally:
        try:
            Bundle.open(bundle).write_report(name, report)
        except UserError as error:
            note(f"the report is not kept: {error}")


@main.command()
@click.argument("bundle", type=cli_options.path)
@click.option(
    "--platform", required=True, metavar="NAME", help="What the project is for: android, cpp, react-native, swift, web."
)
@click.option("-o", "--output", type=cli_options.path, required=True, help="The project's folder; a new one.")
@click.option("--name", metavar="NAME", help="The app's name. Default: the bundle's folder.")
@click.option("--device", metavar="NAME", help="Refuse what does not fit its memory (see 'edgewright devices list').")
@click.option(
    "--packages",
    type=cli_options.path,
    metavar="DIR",
    help="Of web: a node_modules folder with what the site is shipped with.",
)
@click.option(
    "--weights-url",
    metavar="URL",
    help="Of android: the app fetches its weights from this folder, which you fill with the project's upload/.",
)
@click.option("--no-tokenizer", is_flag=True, help="Token ids in and out, for a tokenizer that the platform has not.")
@cli_options.check
@cli_options.as_json
def embed(bundle: Path, platform: str, output: Path, as_json: bool, **options: Any) -> None:
    """Make an app of BUNDLE: a project that builds, with the model, golden traces and a model card."""
    from .apps.embed import EmbedOptions
    from .apps.embed import embed as make
    from .apps.platforms import device_memory
    from .apps.summary import project_json, project_text

    asked = EmbedOptions(
        platform,
        options["name"],
        options["packages"],
        None if options["device"] is None else device_memory(options["device"]),
        tokenizer=not options["no_tokenizer"],
        check=options["check"],
        weights_url=options["weights_url"],
    )
    project = make(bundle, output, asked, note)
    _print(project_json(project, output, platform), project_text(project, output, platform), as_json)


@main.command()
@click.argument("folder", metavar="DIR", type=cli_options.path)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
def preview(folder: Path, port: int) -> None:
    """Serve the site in DIR, made by 'embed --platform web', to this machine's browsers."""
    from .apps.preview import preview as serve_site

    serve_site(folder, port, note)


@main.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in SHELL."""
    click.echo(completion_script(shell))


def _page(bundle: Path, **found: Any) -> str:
    from .reports.page.bundle_page import bundle_html

    return bundle_html(bundle, **found)


def _give(report: str, output: cli_options.ReportOutput) -> None:
    """A report to standard output, or to its file, which is then named on standard error."""
    from .system.writing import write_file

    if output.path is None:
        click.echo(printable(report))
        return
    write_file(output.path, printable(report) + "\n")
    note(f"wrote {output.path}")


def _print(value: dict[str, Any] | Sequence[Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(value, indent=1) if as_json else printable(text))


if __name__ == "__main__":
    main()
