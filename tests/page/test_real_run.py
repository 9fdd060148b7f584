"""The page on real services: a trainer with a key and two replicas on the real engine.

One run, watched from its start on the page to its end there: the tests go on from one another.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from examples.demo.services import DemoServices
from tests.page.conftest import Visit

NUM_STEPS = 500  # more than there is time for
CONFIG = f"""\
run_id: from-the-page
num_steps: {NUM_STEPS}
prompts_per_step: 4
sampling: {{n: 4, max_tokens: 8}}
dataset: {{type: sort_digits, num_prompts: 64}}
rewards:
  - {{type: function, path: "tests.trainer_process:share_of_small_digits"}}
eval: {{dataset: {{type: sort_digits}}, num_prompts: 8, every_steps: 5}}
lora: {{rank: 8, alpha: 16}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 0}}
"""
STEP_MS = 30_000


@pytest.fixture(scope="module")
def services(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[DemoServices]:
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(tiny_checkpoint, root / "model")
    settings = {"CACHE_DIR": str(base_cache), "MAX_NUM_SEQS": "16"}
    with DemoServices(
        root, num_replicas=2, rollout_settings=settings, trainer_settings={"DEVICE": "cpu"}
    ) as services:
        asyncio.run(services.wait_until_ready(timeout_s=150))
        yield services


def step_shown(page: Page) -> int:
    title = page.title()  # 12/500 · from-the-page
    return int(title.partition("/")[0]) if "/" in title else 0


def wait_for_another_step(page: Page) -> None:
    expect(page).not_to_have_title(re.compile(rf"^{step_shown(page)}/"), timeout=STEP_MS)


@pytest.mark.timeout(300)
def test_a_run_is_started_watched_and_stopped_from_the_page(
    services: DemoServices, visit: Callable[..., Visit]
) -> None:
    seen = visit(services.trainer.url, viewport={"width": 1360, "height": 1000})
    page = seen.open()
    page.get_by_label("Key", exact=True).fill(services.api_key)
    page.get_by_role("button", name="Open").click()
    expect(page.locator("#fleet tbody tr")).to_have_count(2)

    page.get_by_role("button", name="Start a run").click()
    page.get_by_label("Run config").fill(CONFIG)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#run-title")).to_have_text("from-the-page", timeout=STEP_MS)

    # Curves move, completions come, both replicas are proven.
    wait_for_another_step(page)
    wait_for_another_step(page)
    curves = page.locator("#curves")
    drawn = curves.get_attribute("data-draws")
    expect(curves).not_to_have_attribute("data-draws", drawn or "", timeout=STEP_MS)
    expect(page.locator("#completions .completion").first).to_be_visible()
    expect(page.locator("#completions")).to_contain_text("prompt tokens")
    expect(page.locator('#fleet tr[data-state="serving"]')).to_have_count(2, timeout=STEP_MS)
    expect(page.locator("#fleet td", has_text="nats").first).to_be_visible()
    expect(page.locator("#figures")).to_contain_text("Eval, greedy")
    seen.shoot("real-run")

    # A replica is killed, and shows; the run goes on.
    killed = services.replicas[1]
    killed.kill()
    lost = page.locator(f'#fleet tr[data-id="{killed.url.removeprefix("http://")}"]')
    expect(lost.locator("td span.is-bad")).to_be_visible(timeout=STEP_MS)
    expect(lost.locator("td.detail")).not_to_be_empty()
    page.locator("#completions-section").scroll_into_view_if_needed()
    seen.shoot("real-run-replica-killed")
    wait_for_another_step(page)
    wait_for_another_step(page)
    expect(page.locator("#link")).to_have_text("Live")

    page.get_by_role("button", name="Stop run").click()
    page.locator("#stop-dialog").get_by_role("button", name="Stop run").click()
    expect(page.locator("#run-state")).to_have_text("stopped", timeout=STEP_MS)
    assert 0 < step_shown(page) < NUM_STEPS
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_label("Run config")).to_have_value(re.compile("run_id: from-the-page"))

    assert seen.complaints == []
    assert seen.hosts == {services.trainer.url.removeprefix("http://")}
