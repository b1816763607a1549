"""Chat templates that ask for too much end in one line, and honest ones give what jinja gives in this process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.vocabularies import letters
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.checkpoints import chat_template
from edgewright.checkpoints.chat_renderer import environment
from edgewright.checkpoints.chat_template import ChatTemplate
from edgewright.checkpoints.tokenizer import Tokenizer
from edgewright.errors import UserError

HI = [{"role": "user", "content": "hi"}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are met at once."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "MEMORY", 64 << 20)
    monkeypatch.setattr(chat_template, "OUTPUT", 10_000)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOPS, "takes more than 1 seconds"),
        ("{{ 7 ** (7 ** 9) }}", "takes more than"),  # while it is compiled: jinja folds constants
        ("{% set n = namespace(x=7) %}{{ n.x ** (n.x ** 9) }}", "takes more than"),
        ("{{ lipsum(n=10 ** 7) }}", "takes more than"),
        ("{{ 'x' * 3 * 10 ** 9 }}", "MiB of memory"),
        (
            "{% set n = namespace(x='xy' * 1000) %}{% for i in range(30) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "of memory",
        ),
        ("{{ 'x' | center(10 ** 9) }}", "MiB of memory"),
        ("{{ [1] | batch(10 ** 9, 0) | list }}", "MiB of memory"),
        ("{{ 'x' * 20000 }}", "gives more than 10280 characters"),
        ("{% for i in range(20000) %}x{% endfor %}", "gives more than 10280 characters"),
    ],
)
def test_a_template_that_asks_for_too_much(small: None, tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = Tokenizer.from_dir(letters(tmp_path, chat_template=template))
    with pytest.raises(UserError, match=f"the model's chat template .*{reason}.*plain prompt") as caught:
        tokenizer.apply_chat(HI)
    assert "\n" not in str(caught.value)


def test_the_next_template_is_rendered_after_a_limit(small: None) -> None:
    template = ChatTemplate("{% if messages[0].content == 'long' %}" + LOOPS + "{% endif %}{{ messages[0].content }}")
    assert template.render(HI, True, {}) == "hi"
    first = template._process
    assert template.render(HI, True, {}) == "hi"
    assert template._process is first
    with pytest.raises(UserError, match="takes more than"):
        template.render([{"content": "long"}], True, {})
    assert first is not None
    assert first.poll() is not None
    assert template.render(HI, True, {}) == "hi"
    assert template._process is not first


def test_the_parent_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.6)
    with pytest.raises(UserError, match="takes more than"):
        ChatTemplate(LOOPS).render(HI, True, {})


def test_a_template_is_of_bounded_length() -> None:
    with pytest.raises(UserError, match="has 1048577 characters"):
        ChatTemplate("x" * (1 << 20) + "x").render(HI, True, {})
    assert ChatTemplate("x" * (1 << 20)).render(HI, True, {}) == "x" * (1 << 20)


@pytest.mark.parametrize(
    "template", ["{{ " + "(" * 9000 + ")" * 9000 + " }}", "{% if 1 %}" * 3000, "{{ -" + "-" * 50_000 + "1 }}"]
)
def test_a_template_nested_too_deep(template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        ChatTemplate(template).render(HI, True, {})


def test_long_messages_widen_the_limits(small: None) -> None:
    text = "knight \U0001f984\n" * (1 << 17)
    template = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{{ m.content | tojson }}{% endfor %}")
    expected = environment().from_string(template.source).render(messages=[{"content": text}])
    assert template.render([{"content": text}], True, {}) == expected


def test_messages_that_are_no_json() -> None:
    with pytest.raises(UserError, match=r"fails on these messages \(TypeError"):
        ChatTemplate("x").render([{"content": object()}], True, {})


def test_surrogates_come_back_and_are_refused_as_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(letters(tmp_path, chat_template='{{ "\\ud800" }}{{ messages[0].content }}'))
    prompt = tokenizer.apply_chat([{"role": "user", "content": "\udc80\ud83d\udc80"}])
    assert prompt == "\ud800\udc80\ud83d\udc80"
    with pytest.raises(UserError, match="surrogates"):
        tokenizer.encode(prompt)


def test_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_dir(letters(tmp_path, chat_template="x"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no process can be started"):
        tokenizer.apply_chat(HI)
    Tokenizer.from_dir(tmp_path, chat=True)


def test_a_process_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"ended the process that renders it \(status 1\)"):
        ChatTemplate("x").render(HI, True, {})


def test_it_starts_early_only_for_a_prompt_that_goes_through_it(tmp_path: Path) -> None:
    letters(tmp_path, chat_template="x")
    Tokenizer.from_dir(tmp_path)
    Tokenizer.from_dir(letters(tmp_path / "none"), chat=True)
    assert chat_template._early == []
    tokenizer = Tokenizer.from_dir(tmp_path, chat=True)
    (process,) = chat_template._early
    assert tokenizer.apply_chat(HI) == "x"
    assert tokenizer._templates["default"]._process is process


def test_a_command_starts_it_before_it_knows_the_template(tmp_path: Path) -> None:
    for folder, named in ((letters(tmp_path / "none"), False), (letters(tmp_path / "one", chat_template="x"), True)):
        chat_template.start_early(folder)
        assert bool(chat_template._early) == named
    process = chat_template._early[0]
    chat_template.start_early(tmp_path / "one")
    assert chat_template._early == [process]
    first, second = ChatTemplate("x"), ChatTemplate("y")
    assert (first.render(HI, True, {}), second.render(HI, True, {})) == ("x", "y")
    assert first._process is process
    assert chat_template._early == []
    (tmp_path / "none" / "chat_template.jinja").write_text("z")
    chat_template.start_early(tmp_path / "none")
    chat_template.start_early(tmp_path / "absent")
    assert ChatTemplate("z").render(HI, True, {}) == "z"
    assert chat_template._early == []


def test_threads_share_a_process() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with ThreadPoolExecutor(4) as pool:
        texts = [str(i) * 1000 for i in range(40)]
        assert list(pool.map(lambda text: template.render([{"content": text}], True, {}), texts)) == texts


def test_it_ends_with_its_template() -> None:
    template = ChatTemplate("x")
    template.render(HI, True, {})
    process = template._process
    assert process is not None
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")
def test_it_inherits_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    template = ChatTemplate("x")
    template.render(HI, True, {})
    assert template._process is not None
    variables = Path(f"/proc/{template._process.pid}/environ").read_text()
    assert "PYTHONSAFEPATH=1" in variables
    assert "SECRET" not in variables


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.fixture
def rendering() -> Iterator[subprocess.Popen[bytes]]:
    """A process that prints its renderer's id and then renders without end."""
    program = (
        "from edgewright.checkpoints.chat_template import ChatTemplate as T\n"
        f"t = T({LOOPS!r}); print(t._running().pid, flush=True); t.render([], True, {{}})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_ctrl_c_ends_both(rendering: subprocess.Popen[bytes]) -> None:
    assert rendering.stdout is not None
    assert rendering.stderr is not None
    child = int(rendering.stdout.readline())
    time.sleep(0.3)
    rendering.send_signal(signal.SIGINT)
    assert rendering.wait(10) != 0
    assert b"KeyboardInterrupt" in rendering.stderr.read()
    assert not running(child)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_renderer_at_rest_ends_with_a_parent_that_is_killed() -> None:
    program = (
        "from edgewright.checkpoints.chat_template import ChatTemplate as T\n"
        "import time; t = T('x'); t.render([], True, {}); print(t._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    for _ in range(100):
        if not running(child):
            break
        time.sleep(0.05)
    assert not running(child)


PIECES = st.sampled_from(
    [
        "{{ bos_token }}",
        "\n  {# note #}  \n",
        "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{%- if add_generation_prompt -%} [assistant] {%- endif -%}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% generation %}{{ messages | length }}{% endgeneration %}",
        "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}",
        "{{ messages[0].content.split('a') | join('|') }}",
        "{{ messages[3].content }}",
        "{% macro f(x) %}({{ x }}){% endmacro %}{{ f(messages | map(attribute='role') | list) }}",
        "text \u2028 é \U0001f984",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": st.text(st.characters())}),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def one() -> ChatTemplate:
    return ChatTemplate("")


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(PIECES, max_size=5), messages=MESSAGES, prompt=st.booleans(), bos=st.text(max_size=3))
def test_honest_templates_give_what_jinja_gives(
    one: ChatTemplate, pieces: list[str], messages: list[dict[str, str]], prompt: bool, bos: str
) -> None:
    one.source = "".join(pieces)
    names = {"bos_token": bos, "eos_token": "</s>"}
    expected, reason = None, ""
    try:
        expected = (
            environment().from_string(one.source).render(messages=messages, add_generation_prompt=prompt, **names)
        )
    except Exception as error:
        reason = str(error)[:20]
    if expected is not None:
        assert one.render(messages, prompt, names) == expected
        return
    with pytest.raises(UserError) as caught:
        one.render(messages, prompt, names)
    assert reason in str(caught.value)
