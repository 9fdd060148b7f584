"""What the page does with what a trainer says: a scripted one behind the real app."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from shared.errors import RunConflict
from shared.schemas import PolicyId, StateRecord
from tests.page.conftest import Visit
from tests.page.scripted_trainer import (
    ScriptedTrainer,
    Served,
    eval_record,
    group,
    replica,
    step_record,
)

Visitor = Callable[..., Visit]
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2}
KEY = "correct-horse"
CONFIG = "num_steps: 7\ndataset: {type: sort_digits}\nrewards: [{type: exact_match}]\n"


def train_a_while(trainer: ScriptedTrainer, num_steps: int = 40) -> None:
    trainer.begin()
    trainer.emit(StateRecord(state="running"))
    trainer.emit(eval_record(0))
    for step in range(1, num_steps + 1):
        trainer.emit(step_record(step))
        if step % 10 == 0:
            trainer.emit(eval_record(step))
    trainer.list_replicas(
        replica(8000, version=num_steps),
        replica(
            8001,
            state="discovered",
            detail="http://10.0.0.7:8001 cannot be reached: connection refused",
            num_failures=3,
            last_sync_s=None,
            logprob_gap=None,
        ),
    )
    trainer.groups = (
        group(num_steps, 1, "Sort: 5 2 7 1 3", ("12357", 1.05), ("1235", 0.05), ("", 0.0)),
        group(num_steps, 0, "Tell a story.", ("<b>Once</b> upon a time. " * 60, 0.8), ("No.", 0.1)),
    )


@pytest.fixture
def locked() -> Iterator[tuple[ScriptedTrainer, Served]]:
    trainer = ScriptedTrainer(api_key=KEY)
    served = Served(trainer)
    yield trainer, served
    served.stop()


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Open").click()


def num_draws(page: Page) -> int:
    return int(page.locator("#curves").get_attribute("data-draws") or 0)


# --- the key ------------------------------------------------------------------------------------


def test_the_key_is_asked_for_once(locked: tuple[ScriptedTrainer, Served], visit: Visitor) -> None:
    seen = visit(locked[1].url)
    page = seen.open()
    enter_key(page, KEY)
    expect(page.locator("#run-title")).to_have_text("No run yet")
    page.reload()
    expect(page.locator("#run-title")).to_have_text("No run yet")
    expect(page.locator("#key-dialog")).to_be_hidden()
    assert seen.complaints == []


def test_a_wrong_key_is_refused_and_asked_for_again(
    locked: tuple[ScriptedTrainer, Served], visit: Visitor
) -> None:
    page = visit(locked[1].url).open()
    enter_key(page, "wrong")
    expect(page.locator("#key-error")).to_have_text("The trainer refused this key.")
    enter_key(page, KEY)
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#link")).to_have_text("Live")


def test_a_key_that_is_not_to_be_remembered_ends_with_the_tab(
    locked: tuple[ScriptedTrainer, Served], visit: Visitor
) -> None:
    page = visit(locked[1].url).open()
    page.get_by_label("Remember it in this browser").uncheck()
    enter_key(page, KEY)
    expect(page.locator("#link")).to_have_text("Live")
    other_tab = page.context.new_page()
    other_tab.goto(locked[1].url)
    expect(other_tab.locator("#key-dialog")).to_be_visible()


def test_without_a_key_of_the_trainer_none_is_asked_for(served: Served, visit: Visitor) -> None:
    seen = visit(served.url)
    page = seen.open()
    expect(page.locator("#run-title")).to_have_text("No run yet")
    expect(page.locator("#key-dialog")).to_be_hidden()
    seen.shoot("no-run")


# --- what is shown ------------------------------------------------------------------------------


def test_a_trainer_that_starts_says_what_it_does(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    trainer.state, trainer.detail = "starting", "loading the model"
    seen = visit(served.url)
    page = seen.open()
    expect(page.locator("#run-title")).to_have_text("The trainer is starting")
    expect(page.locator("#run-note")).to_have_text("loading the model.")
    expect(page.locator("#start")).to_be_disabled()
    seen.shoot("starting")


def test_a_run_shows_its_numbers_curves_replicas_and_completions(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    seen = visit(served.url, color_scheme="light")
    page = seen.open()
    expect(page.locator("#progress-text")).to_contain_text("Step 40 of 120")
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    expect(page.locator("#curves .chart").first.locator("canvas")).to_be_visible()
    assert page.locator("#curves .chart:visible").count() == 13  # no critic, no preferences
    lost = page.locator('#fleet tr[data-state="discovered"]')
    expect(lost).to_contain_text("cannot be reached: connection refused")
    expect(lost.locator("td span.is-bad")).to_have_text("discovered")
    assert page.locator('#fleet tr[data-state="serving"] .is-bad').count() == 0
    expect(page.locator(".group").first).to_contain_text("exact_match 1 · brevity 0.050")
    assert seen.complaints == []
    assert seen.hosts == {served.url.removeprefix("http://")}
    seen.shoot("light")


def test_a_run_that_samples_ahead_shows_the_kl_of_older_versions(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    """No token is fresh then: the logprob gap is absent and has no chart."""
    trainer.begin()
    lags = [{"lag": 1, "kl": 0.02, "num_tokens": 300}, {"lag": 2, "kl": 0.06, "num_tokens": 100}]
    of_fresh_tokens = ("sampler_kl", "logprob_gap", "logprob_gap_p99", "logprob_gap_max")
    absent: dict[str, Any] = dict.fromkeys(of_fresh_tokens)
    for step in (1, 2, 3):
        trainer.emit(step_record(step, num_fresh_tokens=0, kl_by_lag=lags, **absent))
    page = visit(served.url).open()
    kl = page.get_by_role("group", name="KL, nats per token")
    expect(kl.locator(".legend span:visible")).to_have_text(["older versions 0.030"])
    expect(page.get_by_role("group", name=re.compile("Logprob gap"))).to_be_hidden()
    expect(page.locator("#figures")).to_contain_text("0.030 nats, stale")


def test_completions_are_text_whatever_they_hold(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    page = visit(served.url).open()
    story = page.locator(".completion", has_text="upon a time").first
    expect(story).to_contain_text("<b>Once</b> upon a time.")
    folded = story.locator(".clamped")
    height = folded.bounding_box()
    story.get_by_role("button", name="Show all").click()
    unfolded = story.locator(".text").bounding_box()
    assert height
    assert unfolded
    assert unfolded["height"] > height["height"]
    expect(page.locator("#follow")).not_to_be_checked()  # what is read stays where it is


def test_curves_move_with_every_step(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer, num_steps=3)
    page = visit(served.url).open()
    expect(page.locator("#progress-text")).to_contain_text("Step 3 of")
    before = num_draws(page)
    trainer.emit(step_record(4))
    expect(page.locator("#progress-text")).to_contain_text("Step 4 of")
    expect(page.locator("#curves")).not_to_have_attribute("data-draws", str(before))
    reward = page.locator(".chart.hero .legend b").first
    expect(reward).to_have_text(f"{step_record(4).reward_mean:.3f}")


def test_five_thousand_steps_are_drawn_with_a_bounded_number_of_points(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    trainer.begin(num_steps=5000)
    spike: dict[int, dict[str, Any]] = {3210: {"grad_norm": 77.0}}
    for step in range(1, 5001):
        trainer.emit(step_record(step, **spike.get(step, {})))
    page = visit(served.url).open()
    expect(page.locator("#progress-text")).to_contain_text("Step 5\u202f000 of 5\u202f000")
    chart = page.get_by_role("group", name=re.compile("Gradient norm"))
    chart.scroll_into_view_if_needed()
    chart.focus()
    values = set()
    page.keyboard.press("Home")
    for _ in range(1200):
        page.keyboard.press("ArrowRight")
        values.add(chart.locator(".legend b").inner_text())
        if "77" in values or chart.locator(".at").inner_text() == "step 5\u202f000":
            break
    assert "77" in values, "the spike is lost between two points"


def test_a_zoom_shows_its_steps_in_all_charts_and_can_be_left(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    page = visit(served.url).open()
    box = page.locator(".chart.hero .u-over").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.25 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=5)
    page.mouse.up()
    expect(page.locator("#curves-hint")).to_have_text("steps 10 to 20")
    page.get_by_role("button", name="Show all steps").click()
    expect(page.locator("#curves-hint")).to_contain_text("by step")


def test_a_failed_run_says_the_sentence_of_the_trainer(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    sentence = "reward function judge:score returned NaN for completion 3: mend it, then go on."
    trainer.emit(StateRecord(state="failed", detail=sentence))
    seen = visit(served.url, color_scheme="dark")
    page = seen.open()
    expect(page.locator(".banner.bad")).to_have_text(f"The run failed {sentence}")
    expect(page.locator("#run-state")).to_have_text("failed")
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    seen.shoot("failed")


def test_what_stalls_training_is_a_banner_until_it_is_over(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    trainer.change(stalls=("step 40 taught nothing: all 32 groups have equal rewards",))
    page = visit(served.url).open()
    expect(page.locator(".banner")).to_contain_text("step 40 taught nothing")
    trainer.change(stalls=())
    expect(page.locator(".banner")).to_have_count(0)


# --- run control --------------------------------------------------------------------------------


def test_a_run_is_started_from_a_typed_config_and_stopped(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    page = visit(served.url).open()
    page.get_by_role("button", name="Start a run").click()
    page.get_by_label("Run config").fill(CONFIG)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#run-state")).to_have_text("running")
    assert trainer.started[0].num_steps == 7
    page.get_by_role("button", name="Stop run").click()
    page.locator("#stop-dialog").get_by_role("button", name="Stop run").click()
    expect(page.locator("#run-state")).to_have_text("stopped")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_label("Run config")).to_have_value(re.compile("num_steps: 7"))


def test_a_config_can_be_a_file(served: Served, visit: Visitor) -> None:
    page = visit(served.url).open()
    page.get_by_role("button", name="Start a run").click()
    page.locator("#file").set_input_files(
        {"name": "run.yaml", "mimeType": "text/plain", "buffer": CONFIG.encode()}
    )
    expect(page.get_by_label("Run config")).to_have_value(CONFIG)


def test_the_example_is_a_config_that_the_trainer_takes(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    seen = visit(served.url)
    page = seen.open()
    page.get_by_role("button", name="Start a run").click()
    page.get_by_role("button", name="an example").click()
    seen.shoot("start")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#run-state")).to_have_text("running")
    assert trainer.started[0].num_steps == 50


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("num_stepz: 7", "unknown key 'num_stepz'"),
        ("a: [", "the run config is neither YAML nor JSON"),
    ],
)
def test_a_config_that_is_refused_says_why_and_stays(
    served: Served, visit: Visitor, config: str, sentence: str
) -> None:
    page = visit(served.url).open()
    page.get_by_role("button", name="Start a run").click()
    page.get_by_label("Run config").fill(config)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#start-error")).to_contain_text(sentence)
    expect(page.get_by_label("Run config")).to_have_value(config)


def test_a_start_that_the_trainer_refuses_says_its_sentence(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    trainer.fail_start = RunConflict("run 'a' is running: stop it with POST /runs/current/stop")
    page = visit(served.url).open()
    page.get_by_role("button", name="Start a run").click()
    page.get_by_label("Run config").fill(CONFIG)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#start-error")).to_have_text(trainer.fail_start.detail)


# --- cuts ---------------------------------------------------------------------------------------


def test_a_stream_that_was_cut_goes_on_after_the_last_event(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer, num_steps=5)  # 7 events with the state and the evaluation before
    page = visit(served.url).open()
    expect(page.locator(".chart.hero canvas")).to_be_visible()
    trainer.cut()
    trainer.emit(step_record(6))
    expect(page.locator("#progress-text")).to_contain_text("Step 6 of")
    assert trainer.resumed_at == [0, 7]


def test_a_trainer_that_is_away_is_said_and_found_again(
    trainer: ScriptedTrainer, visit: Visitor
) -> None:
    train_a_while(trainer, num_steps=5)
    served = Served(trainer)
    seen = visit(served.url)
    seen.page.clock.install()
    try:
        page = seen.open()
        expect(page.locator("#link")).to_have_text("Live")
    finally:
        served.stop()
    expect(page.locator("#link")).to_contain_text("The trainer does not answer; retrying in")
    expect(page.locator("#progress-text")).to_contain_text("Step 5 of")  # what is known stays
    seen.shoot("away")
    page.clock.pause_at(page.evaluate("Date.now() + 60_000") / 1000)  # no retry but the click's
    retry = page.get_by_role("button", name="Retry now")
    expect(retry).to_be_visible()
    again = Served(trainer, served.port)
    try:
        retry.click()
        page.clock.resume()
        expect(page.locator("#link")).to_have_text("Live")
    finally:
        again.stop()


def test_another_life_of_a_run_is_read_from_its_first_event(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    """A trainer that died at step 5 resumes at step 3: what came after that is no more."""
    train_a_while(trainer, num_steps=5)
    page = visit(served.url).open()
    expect(page.locator("#progress-text")).to_contain_text("Step 5 of")
    life = PolicyId(run_id="sort-digits", incarnation=2, version=0)
    trainer.begin(life)
    for step in (1, 2, 3):
        trainer.emit(step_record(step, run=life))
    expect(page.locator("#progress-text")).to_contain_text("Step 3 of")
    expect(page.locator("#progress-text")).to_contain_text("life 2")


# --- how it looks -------------------------------------------------------------------------------


def test_nothing_is_wider_than_the_window(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    trainer.change(stalls=("a-word-without-a-break-" * 20,))
    page = visit(served.url).open()
    expect(page.locator(".group").first).to_be_visible()
    too_wide = []
    for width in (1920, 1280, 1000, 768, 360, 320):
        page.set_viewport_size({"width": width, "height": 800})
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            too_wide.append(width)
    assert too_wide == []


def test_on_a_phone_charts_are_one_column_and_the_table_scrolls_in_its_box(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    seen = visit(served.url, **PHONE)
    page = seen.open()
    expect(page.locator(".group").first).to_be_visible()
    seen.shoot("phone")
    lefts = page.locator("#curves .chart:visible").evaluate_all(
        "charts => charts.map((chart) => chart.getBoundingClientRect().left)"
    )
    assert len(set(lefts)) == 1
    assert page.locator("#fleet").evaluate("box => box.scrollWidth > box.clientWidth")


def test_dark_is_the_systems_choice_or_the_readers(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    seen = visit(served.url, color_scheme="dark")
    page = seen.open()
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    expect(page.locator(".group").first).to_be_visible()
    seen.shoot("dark")
    page.get_by_label("Theme").select_option("light")
    light = page.evaluate(ground)
    assert (dark, light) == ("rgb(19, 20, 22)", "rgb(252, 252, 251)")
    page.reload()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(
    trainer: ScriptedTrainer, served: Served, visit: Visitor, scheme: str
) -> None:
    train_a_while(trainer)
    trainer.list_replicas(
        *trainer.fleet.status(), replica(8002, state="quarantined", detail="another base")
    )
    trainer.emit(StateRecord(state="failed", detail="the judge is away"))
    page = visit(served.url, color_scheme=scheme).open()
    expect(page.locator(".group").first).to_be_visible()
    assert page.evaluate(LOW_CONTRAST) == []


LOW_CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(element).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.disabled) continue;
    if (element.closest("script, noscript")) continue;
    const text = parse(getComputedStyle(element).color);
    const [high, low] = [luminance(text), luminance(ground(element))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


def test_the_page_is_used_without_a_mouse(
    trainer: ScriptedTrainer, served: Served, visit: Visitor
) -> None:
    train_a_while(trainer)
    page = visit(served.url).open()
    expect(page.locator(".group").first).to_be_visible()
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")
        )
    assert {"theme", "stop", "fleet"} <= set(reached)
    chart = page.get_by_role("group", name="Entropy, nats per token")
    chart.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#announcer")).to_have_text(
        f"Entropy, step 1: entropy {step_record(1).entropy:.2f}"
    )


def test_the_policy_of_the_page_forbids_everything_from_elsewhere(
    served: Served, visit: Visitor
) -> None:
    page = visit(served.url).open()
    outcome = page.evaluate(
        """async () => {
          const refused = new Promise((resolve) =>
            document.addEventListener("securitypolicyviolation", resolve));
          fetch("http://example.com/").catch(() => {});
          return (await refused).effectiveDirective;
        }"""
    )
    assert outcome == "connect-src"
