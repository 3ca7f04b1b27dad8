"""The table ``[analysis]``: nothing is contacted unless it says so, and its mistakes have a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.model import ConfigurationError
from reconciler.settings import AnalysisSettings, load
from tests.unit.support import ROOT


def wrong(text: str) -> str:
    Path("reconciler.toml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load()
    return str(caught.value)


def test_by_default_nobody_is_asked() -> None:
    found = load().analysis
    assert found == AnalysisSettings()
    assert (found.policy, found.endpoint, found.commands) == ("suggest", None, ())


def test_everything_can_be_set_in_the_file() -> None:
    Path("reconciler.toml").write_text(
        '[analysis]\npolicy = "allowlisted"\nendpoint = "http://127.0.0.1:9190/v1/"\nmodel = "glm"\n'
        'api_key = "$file:/run/key"\ncommands = [["mm"], ["claude-glm", "-p"]]\ntimeout = 20\ntotal = "90s"\n'
        'environment = ["MM_KEY"]\n'
    )
    assert load().analysis == AnalysisSettings(
        policy="allowlisted",
        endpoint="http://127.0.0.1:9190/v1",
        model="glm",
        api_key="$file:/run/key",
        commands=(("mm",), ("claude-glm", "-p")),
        timeout="20s",
        total="90s",
        environment=("MM_KEY",),
    )


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("reconciler.toml").write_text('[analysis]\npolicy = "full"\nmodel = "glm"\n')
    monkeypatch.setenv("RECONCILER_ANALYSIS__POLICY", "suggest")
    monkeypatch.setenv("RECONCILER_ANALYSIS__COMMANDS", '[["mm"]]')
    found = load().analysis
    assert (found.policy, found.model, found.commands) == ("suggest", "glm", (("mm",),))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('polcy = "full"', "unknown key 'polcy' (known: policy, endpoint"),
        ('policy = "all"', "policy: Input should be 'suggest', 'allowlisted' or 'full'"),
        ('endpoint = "127.0.0.1:9190"', "endpoint: write the base URL"),
        ('endpoint = "http://a:hunter2@b/v1"', "endpoint: write the base URL"),
        ('api_key = "hunter2"', "api_key: refer to it with $env:NAME or $file:/path"),
        ('api_key = "$env:"', "api_key: refer to it"),
        ('commands = ["mm hunter2"]', "commands.0: Input should be a valid tuple"),
        ("commands = [[]]", "commands.0: Tuple should have at least 1 item"),
        ('timeout = "soon"', "timeout: "),
        ('total = "0s"', "total: has to be longer than nothing"),
        ('environment = ["A=hunter2"]', "environment.0: write the names"),
        (
            'environment = ["RECONCILER_DB"]',
            "environment.0: the settings of the reconciler are not handed on",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place_and_repeats_no_secret(line: str, message: str) -> None:
    found = wrong(f"[analysis]\n{line}\n")
    assert message in found
    assert "[analysis]" in found
    assert "hunter2" not in found


def test_what_is_no_table() -> None:
    assert "[analysis]" in wrong('analysis = "hunter2"\n')
    assert "hunter2" not in wrong('analysis = "hunter2"\n')


def test_every_setting_is_documented() -> None:
    """With its default."""
    text = (ROOT / "docs" / "analysis.md").read_text()
    for name, field in AnalysisSettings.model_fields.items():
        default = f"`{field.default}`" if field.default else "none"
        assert f"| `{name}` | {default} |" in text, name
