"""How a command explains itself: options by purpose, two examples, the nearest known name for an unknown one, shell completion."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import get_completion_class

from ..errors import UserError

GROUPS = {
    "Source": ("model", "adapter", "pooling", "num_layers", "against"),
    "Budget": (
        *("bits", "size", "latency", "energy", "memory_budget", "device", "sure", "plan_file", "overrides", "widths"),
        *("group_size", "importance"),
    ),
    "Calibration": ("quantizer", "norms", "calibration", "task", "workers", "cluster", "memory_limit"),
    "Targets": ("formats", "format", "kv_cache", "max_context", "threads"),
    "Prompt": (
        *("prompt", "context", "memory", "save_memory", "target_language", "chat", "template", "template_args"),
        *("system", "tools", "show_prompt"),
    ),
    "Answer": (
        *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "no_repeat_ngram", "seed", "answers", "stops", "stop_tokens"),
    ),
    "Sound": ("audio", "language", "translate", "timestamps"),
    "Embedding": ("embed", "texts", "prompt_name"),
    "Server": ("host", "port", "api_key", "name", "waiting"),
    "Checks": ("no_verify", "strict_placement", "check", "task_limit", "text", "text_windows"),
    "Measurement": ("prompts", "new", "depths", "repeats", "seconds"),
    "Output": ("output", "dry_run", "plot", "ladder", "as_json"),
}
"""Purpose -> the parameters that serve it. Targets' own options are among "Targets"; the rest comes last."""

EXAMPLES = {
    "export": (
        "edgewright export -m google/t5gemma-s-s-prefixlm --format all --bits 4.5 -o bundle",
        "edgewright export -m ./llama --calibration text.txt --size 180m --format onnx --format coreml -o bundle",
    ),
    "plan": (
        "edgewright plan -m ./llama --bits 4 --calibration text.txt -o plan.json",
        "edgewright plan -m ./llama --calibration text.txt --frontier --plot frontier.svg",
    ),
    "embed": (
        "edgewright embed bundle --platform web -o site --packages node_modules",
        "edgewright embed bundle --platform android --name reader -o app",
    ),
    "preview": (
        "edgewright preview site",
        "edgewright preview site --port 0",
    ),
    "rewrite": (
        "edgewright rewrite -m ./gemma-3-270m --adapt -o t5gemma2-270m",
        r"edgewright rewrite -m ./llama --eugen 'layers\.3\.mlp:m=256,k=2' --calibration text.txt -o eugen",
    ),
    "verify": (
        "edgewright verify bundle",
        "edgewright verify bundle -m ./llama --text held-out.txt --task task.tsv",
    ),
    "run": (
        'edgewright run bundle --prompt "What is the capital of France?"',
        'edgewright run bundle --prompt - --temperature 0.7 --top-p 0.9 --stop "\\n\\n" < prompt.txt',
    ),
    "chat": (
        "edgewright chat bundle",
        'edgewright chat bundle --system "You are brief." --template-arg enable_thinking=false',
    ),
    "serve": (
        "edgewright serve bundle",
        "edgewright serve bundle --host 0.0.0.0 --port 8080 --api-key KEY",
    ),
    "profile": (
        "edgewright profile bundle -p 512 -n 128 -d 0,1024",
        "edgewright profile bundle --device ssh://pi@raspberrypi.local --sustain 120",
    ),
    "compare": (
        "edgewright compare bundle-4bit bundle-5bit",
        "edgewright compare bundles/* -o csv",
    ),
    "inspect": ("edgewright inspect ./llama", "edgewright inspect bundle --json"),
    "doctor": ("edgewright doctor", "edgewright doctor --device ssh://pi@raspberrypi.local"),
    "completion": (
        'eval "$(edgewright completion bash)"',
        "edgewright completion fish > ~/.config/fish/completions/edgewright.fish",
    ),
}
"""Command -> two ways to call it."""

SHELLS = ("bash", "zsh", "fish")


class Command(click.Command):
    """A command whose help has its options by purpose, and examples."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each purpose."""
        left = {
            str(parameter.name): record
            for parameter in self.get_params(ctx)
            if (record := parameter.get_help_record(ctx)) is not None
        }
        own = _own_options() & left.keys()
        for title, names in GROUPS.items():
            members = [*names, *sorted(own)] if title == "Targets" else names
            records = [left.pop(name) for name in members if name in left]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if left:
            with formatter.section("Options"):
                formatter.write_dl(list(left.values()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        examples = EXAMPLES.get(self.name or "", ())
        if examples:
            with formatter.section("Examples"):
                for example in examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def completion_script(shell: str, command: str = "edgewright") -> str:
    """The script that completes commands and options in a shell. Raises UserError for another shell."""
    kind = get_completion_class(shell)
    if kind is None or shell not in SHELLS:
        raise UserError(f"there is no completion for {shell}; there is for {', '.join(SHELLS)}")
    no_command: Any = click.Command(command)
    return kind(no_command, {}, command, f"_{command.upper()}_COMPLETE").source()


def _own_options() -> set[str]:
    """Parameters that are a target's own."""
    from ..targets.registry import TARGETS

    flags = [target.option.flag for target in TARGETS.values() if target.option is not None]
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}
