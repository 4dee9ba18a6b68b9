"""The cards of the configurations say what was run, and hold for the flags and counts of today."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from examples.verify import __main__ as verify
from examples.verify import cards, page, trained
from examples.verify.built import counts
from examples.verify.configurations import CONFIGURATIONS, Configuration, arguments_of
from examples.verify.held_bytes import RankBytes
from megatron_sffn.utils.errors import ConfigError

pytestmark = [
    # Megatron itself causes both warnings.
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning:megatron"),
]

GRID = Configuration(script="unified_sffn.sh", arguments=("avg-k", "256", "16"))


def todays_counts(configuration: Configuration) -> dict[str, int]:
    return counts(
        arguments_of(configuration.script, *configuration.arguments, ranks=configuration.ranks[0])
    )


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_every_card_holds_for_the_flags_and_the_accounting_of_today(
    configuration: Configuration,
) -> None:
    card = cards.read_card(configuration)
    assert card["configuration"] == configuration.name
    reasons = cards.problems(configuration, card, todays_counts(configuration))
    assert reasons == [], f"run python -m examples.verify --only '^{configuration.name}$'"


def test_every_card_belongs_to_a_configuration() -> None:
    assert set(cards.CARDS.iterdir()) == {cards.card_path(c) for c in CONFIGURATIONS}


def test_the_page_says_what_the_cards_say() -> None:
    text = page.PAGE.read_text()
    assert text == page.renewed(text), "run python -m examples.verify"


def test_a_stale_or_unfounded_card_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    card, today = cards.read_card(GRID), todays_counts(GRID)

    def problems_after(change: str) -> str:
        changed = copy.deepcopy(card)
        exec(change, {"card": changed})
        (sentence,) = cards.problems(GRID, changed, today)
        return sentence

    assert "today's accounting" in problems_after("card['counts']['active'] += 1")
    assert "today's accounting" in problems_after("card['counts']['flops_forward'] += 1")
    assert "flags of the script" in problems_after("card['flags_sha256'] = '0'")
    unfounded = "gpu does not say how it was run"
    assert problems_after("card['checks']['gpu'] = {'result': 'passed'}") == unfounded
    failure = "card['checks']['built'] = {'result': 'failed', 'reason': 'no'}"
    assert problems_after(failure) == "built failed: no"
    monkeypatch.setattr(Configuration, "flags", lambda *_, **__: ["--lr", "1"])
    assert "flags of the script" in problems_after("pass")


def test_passed_checks_are_skipped_and_a_failed_one_is_kept_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "CARDS", tmp_path)
    monkeypatch.setitem(verify.RUNS, "trained", lambda *_: pytest.fail("it must be skipped"))

    def fails(*_: object) -> None:
        raise AssertionError("built: 1 parameters, counted 2")

    card = cards.read_card(GRID)
    run = cards.run_record("command", 1.0)
    card["flags_sha256"] = GRID.digest()
    card["checks"]["trained"] = {"result": "passed", "run": run}
    cards.write_card(GRID, card)
    monkeypatch.setitem(verify.RUNS, "built", fails)
    words = verify.verify(GRID, ["trained", "built"], again=False)
    assert words[0] == "trained had passed" and words[1].startswith("built failed in ")
    checks = cards.read_card(GRID)["checks"]
    assert checks["built"]["reason"] == "built: 1 parameters, counted 2"
    assert checks["trained"]["run"] == run and checks["gpu"] == {"result": "not run"}
    # Other flags: nothing of the card holds any more.
    monkeypatch.setattr(Configuration, "digest", lambda _: "other")
    verify.verify(GRID, ["built"], again=False)
    assert cards.read_card(GRID)["checks"]["trained"] == {"result": "not run"}


def test_the_checks_refuse_wrong_losses_and_bytes() -> None:
    counted = RankBytes(weights=4, gradients=8, optimizer=12)
    good = [6.93, 6.92, 6.91, 6.90, 6.89]
    for losses in (good[:4], [9.0, *good[1:]], [*good[:4], 6.92]):
        with pytest.raises(AssertionError):
            trained.assert_trained(trained.Training(losses=losses, ranks=[]))
    trained.assert_trained(trained.Training(losses=good, ranks=[counted]))
    for wrong in ((5, 8, 12), (4, 9, 12), (4, 8, 16)):
        held = RankBytes(**dict(zip(vars(counted), wrong, strict=True)))
        with pytest.raises(AssertionError):
            trained.assert_memory(trained.Training(losses=good, ranks=[counted, held]), counted)
    assert trained.largest_difference([*good[:4], 6.8], good) == pytest.approx(0.09 / 6.89)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checks built,gpu", "--checks gpu is unknown; choose from built, trained, layouts"),
        ("--only no-such", "--only no-such matches no configuration; --list prints their names"),
    ],
)
def test_bad_flags_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verify.main(arguments.split())
