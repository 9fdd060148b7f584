// The page from load to close: when it asks the trainer for what, and where it shows the answers.
//
//   GET /status, /replicas   every 2 s, while the page is visible    ─▶ run, banners, fleet
//   GET …/events             one stream per life of a run            ─▶ history ─▶ curves, figures
//   GET …/completions        after a step, while they are followed   ─▶ completions

import * as api from "./api.js";
import { Curves } from "./charts.js";
import { Completions } from "./completions.js";
import { fleetSummary, fleetTable, wrongness } from "./fleet.js";
import { History, staleKl } from "./history.js";
import { $, NONE, count, duration, h, number, percent } from "./text.js";

/** @import { PolicyId, ReplicaStatus, RunStatus, TrainerStatus } from "./wire.js" */

const POLL_MS = 2_000;
const RETRY_MS = [1_000, 2_000, 4_000, 8_000, 15_000];
const COMPLETIONS_MS = 2_000;
const FIRST_GROUPS = 6;
const ALL_GROUPS = 64;
const ENDED = new Set(["completed", "stopped", "failed", "suspended"]);
const WITHOUT_RUN = {
  starting: "The trainer is starting",
  ready: "No run yet",
  dead: "The trainer has stopped",
};
const DRAFT = "tandem.config";
const EXAMPLE = `# GRPO on sorting five digits. docs/settings.md lists every setting.
num_steps: 50
prompts_per_step: 32
sampling:
  n: 8            # completions per prompt
  max_tokens: 8
dataset:
  type: sort_digits
rewards:
  - type: exact_match
eval:
  dataset:
    type: sort_digits
  num_prompts: 256
  every_steps: 10
lora:
  rank: 16
  alpha: 32
optimizer:
  learning_rate: 1.0e-3
  warmup_steps: 0
algorithm: grpo
`;

/** @type {TrainerStatus | null} */
let trainer = null; // null until the trainer answers
/** @type {ReplicaStatus[]} */
let replicas = [];
/** @type {string | null} */
let life = null; // the life whose events are followed, as "run_id.incarnation"
let history = new History();
/** @type {AbortController | null} */
let following = null; // ends the stream
let numFailures = 0; // polls that failed in a row
let isStreamCut = false;
/** @type {Set<() => void>} */
const pauses = new Set(); // a function for each current pause, which ends it

const curves = new Curves($("curves"), (range) => {
  $("unzoom").hidden = range === null;
  $("curves-hint").textContent = range
    ? `steps ${count(range[0])} to ${count(range[1])}`
    : "by step · drag to zoom, arrow keys read values";
});
const completions = new Completions($("completions"), () => follow(false));

// --- time ----------------------------------------------------------------------------------------

/**
 * Wait; `lookNow` ends the wait early.
 * @param {number} ms
 * @returns {Promise<void>}
 */
function pause(ms) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      pauses.delete(end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    pauses.add(end);
  });
}

/** End every pause, so that the trainer is asked at once. */
const lookNow = () => [...pauses].forEach((end) => end());

/**
 * @param {EventTarget} target
 * @param {string} name
 */
const until = (target, name) =>
  new Promise((resolve) => target.addEventListener(name, resolve, { once: true }));

async function watch() {
  if (document.documentElement.dataset.key && !api.key.get()) await askForKey();
  for (;;) {
    if (document.hidden) await until(document, "visibilitychange");
    try {
      const [status, fleet] = await Promise.all([api.getStatus(), api.getReplicas()]);
      if (numFailures) lookNow(); // the stream is waiting too
      numFailures = 0;
      showLink();
      take(status, fleet.replicas);
      await pause(POLL_MS);
    } catch (error) {
      if (error instanceof api.Problem && error.status === 401) await askForKey();
      else if (error instanceof api.Away || error instanceof api.Problem) await standBy(error);
      else throw error;
    }
  }
}

/**
 * Say that the trainer is away, and wait before the next attempt, longer each time.
 * @param {Error} error
 */
async function standBy(error) {
  const ms = RETRY_MS[Math.min(numFailures++, RETRY_MS.length - 1)];
  const end = Date.now() + ms;
  const tell = () => showLink(error.message, Math.max(1, Math.ceil((end - Date.now()) / 1000)));
  tell();
  const ticking = setInterval(tell, 1000);
  await pause(ms);
  clearInterval(ticking);
}

/**
 * @param {string | null} problem
 * @param {number} seconds until the next attempt
 */
function showLink(problem = null, seconds = 0) {
  document.body.classList.toggle("away", problem !== null);
  $("retry").hidden = problem === null;
  $("forget").hidden = !api.key.get();
  let [state, text] = isStreamCut ? ["cut", "Reconnecting to the event stream"] : ["live", "Live"];
  if (problem !== null) {
    state = "away";
    text = `${problem[0].toUpperCase()}${problem.slice(1)}; retrying in ${seconds} s`;
  }
  $("link").dataset.link = state;
  if ($("link").textContent !== text) $("link").textContent = text;
}

// --- the stream ----------------------------------------------------------------------------------

/**
 * Show the answers of the trainer, and follow the run that it names.
 * @param {TrainerStatus} status
 * @param {ReplicaStatus[]} fleet
 */
function take(status, fleet) {
  trainer = status;
  replicas = fleet;
  const run = status.run;
  const now = run && `${run.policy.run_id}.${run.policy.incarnation}`;
  if (now !== life) {
    following?.abort();
    setCut(false);
    life = now;
    history = new History();
    curves.show(history);
    completions.show({ reward_names: [], groups: [] });
    if (now) stream(now, (following = new AbortController()).signal, history);
    loadCompletions();
  }
  showRun();
}

/**
 * Read the events of one life of a run to its end, over as many connections as it takes.
 * @param {string} name
 * @param {AbortSignal} signal
 * @param {History} into
 */
async function stream(name, signal, into) {
  let lastId = -1;
  let numCuts = 0;
  while (!signal.aborted) {
    try {
      for await (const batch of api.events(lastId, signal)) {
        if (batch.some(({ data }) => data.kind !== "state" && !isOf(data.policy, name)))
          throw new api.Away("another run");
        for (const { id, data } of batch) {
          lastId = id;
          into.add(data);
        }
        numCuts = 0;
        setCut(false);
        if (batch.length) onEvents();
        if (batch.some(({ data }) => data.kind === "state")) lookNow();
      }
      if (into.state && ENDED.has(into.state.state)) return lookNow();
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof api.Away || error instanceof api.Problem)) throw error;
    }
    setCut(true);
    lookNow();
    const ms = RETRY_MS[Math.min(numCuts++, RETRY_MS.length - 1)];
    await pause(ms);
  }
}

/**
 * Whether a policy belongs to the run of a life. Its incarnation may be lower: the stream begins
 * with the steps and evaluations of earlier lives.
 * @param {PolicyId} policy
 * @param {string} name
 */
const isOf = (policy, name) => policy.run_id === name.slice(0, name.lastIndexOf("."));

/** @param {boolean} value */
function setCut(value) {
  if (isStreamCut === value) return;
  isStreamCut = value;
  if (numFailures === 0) showLink();
}

let isShowing = false;
function onEvents() {
  curves.draw();
  if (isShowing) return;
  isShowing = true;
  requestAnimationFrame(() => {
    isShowing = false;
    showRun();
  });
  loadCompletions();
}

// --- the run -------------------------------------------------------------------------------------

function showRun() {
  if (!trainer) return;
  const { run } = trainer;
  const hasEnded = !run || ENDED.has(run.state);
  const step = history.lastStep?.step ?? run?.step ?? 0;
  $("model").textContent = trainer.model;
  $("run-title").textContent = run?.run_id ?? WITHOUT_RUN[trainer.state];
  document.title = run
    ? `${run.num_steps ? `${step}/${run.num_steps}` : run.state} · ${run.run_id}`
    : "Tandem";
  $("run-state").textContent = run?.state ?? "";
  $("run-state").toggleAttribute("data-wrong", run?.state === "failed");
  $("start").hidden = !hasEnded || trainer.state === "dead";
  $("start").disabled = trainer.state !== "ready";
  $("stop").hidden = hasEnded;
  $("stop").disabled = run?.state === "stopping";
  $("resume").hidden = !run || !["stopped", "failed", "suspended"].includes(run.state);
  showProgress(run, step, hasEnded);
  showNote(trainer);
  showBanners(trainer);
  showFigures(run);
  showFleet(run);
  $("curves-section").hidden = !run;
  $("curves").hidden = history.isEmpty;
  $("curves-empty").hidden = !history.isEmpty;
  $("curves-hint").hidden = history.isEmpty;
  $("curves-empty").textContent = hasEnded
    ? "The run ended before its first step."
    : "The curves begin with the first step.";
  $("completions-section").hidden = !run;
  $("intro").hidden = Boolean(run) || trainer.state !== "ready";
}

/**
 * @param {RunStatus | null} run
 * @param {number} step
 * @param {boolean} hasEnded
 */
function showProgress(run, step, hasEnded) {
  $("run-progress").hidden = !run;
  if (!run) return;
  $("bar").hidden = !run.num_steps;
  $("bar").value = run.num_steps ? step / run.num_steps : 0;
  const typical = history.typicalStepSeconds;
  const left = run.num_steps && typical && !hasEnded ? (run.num_steps - step) * typical : null;
  const policy = history.lastStep?.policy ?? run.policy;
  const parts = [
    h(
      "b",
      {},
      run.num_steps
        ? `Step ${count(step)} of ${count(run.num_steps)}`
        : `Step ${count(step)} of your own loop`,
    ),
    `policy v${count(Math.max(policy.version, run.policy.version))}`,
    run.policy.incarnation > 1 && `life ${count(run.policy.incarnation)}`,
    left !== null && `about ${duration(left)} left`,
    typical ? `${number(typical)} s per step` : null,
  ].filter((part) => part !== false && part !== null);
  $("progress-text").replaceChildren(
    ...parts.flatMap((part, index) => (index ? [" · ", part] : [part])),
  );
}

/** @param {TrainerStatus} status */
function showNote({ state, detail, run }) {
  const isInBanner = run?.state === "failed";
  const note = state === "starting" ? `${detail}.` : isInBanner ? "" : (run?.detail ?? "");
  $("run-note").hidden = !note;
  if ($("run-note").textContent !== note) $("run-note").textContent = note;
}

/**
 * What holds up training, in the trainer’s own sentences.
 * @param {TrainerStatus} status
 */
function showBanners({ state, detail, run }) {
  /** @type {[kind: "bad" | "warn", title: string, sentence: string][]} */
  const found = [];
  if (state === "dead") found.push(["bad", "The trainer cannot continue", detail]);
  if (run?.state === "failed") found.push(["bad", "The run failed", run.detail]);
  for (const sentence of run?.stalls ?? []) found.push(["warn", "Training is held up", sentence]);
  for (const replica of replicas.filter((item) => item.state === "quarantined")) {
    found.push(["warn", `Replica ${replica.id} is quarantined`, replica.detail]);
  }
  const wanted = JSON.stringify(found);
  if ($("banners").dataset.shown === wanted) return;
  $("banners").dataset.shown = wanted;
  $("banners").replaceChildren(
    ...found.map(([kind, title, sentence]) =>
      h("p", { className: `banner ${kind}` }, h("b", {}, title), " ", sentence),
    ),
  );
}

/** @param {RunStatus | null} run */
function showFigures(run) {
  const step = history.lastStep;
  const evaluation = history.lastEval;
  $("figures").hidden = !run || !(step || evaluation);
  if ($("figures").hidden) return;
  const isFresh = step?.sampler_kl !== undefined; // otherwise the KL is over older versions
  const kl = isFresh ? step.sampler_kl : step && staleKl(step);
  /** @type {[label: string, value: string, note?: string | null][]} */
  const figures = [];
  if (!step) figures.push(["Reward", NONE]);
  else if (step.reward_mean !== undefined) {
    figures.push(["Reward", number(step.reward_mean), `± ${number(step.reward_std)}`]);
  }
  if (evaluation) {
    const { greedy_reward: reward, step: evaluatedAt } = evaluation;
    figures.push(["Eval, greedy", number(reward), `step ${count(evaluatedAt)}`]);
  }
  figures.push(["KL", number(kl), isFresh || !step ? "nats" : "nats, stale"]);
  if (isFresh) figures.push(["Logprob gap", number(step.logprob_gap), "nats"]);
  const staleness = step?.staleness_max ? `≤ ${count(step.staleness_max)} versions` : "versions";
  figures.push(
    ["Staleness", number(step?.staleness_mean), step && staleness],
    ["Throughput", count(step?.tokens_per_s), "tokens/s"],
    ["Trainer idle", percent(step?.trainer_idle_fraction)],
    ["Replicas idle", percent(step?.rollout_idle_fraction)],
  );
  $("figures").replaceChildren(
    h(
      "dl",
      { className: "figures-list" },
      ...figures.map(([label, value, note]) =>
        h("div", {}, h("dt", {}, label), h("dd", {}, value, note && h("small", {}, ` ${note}`))),
      ),
    ),
  );
}

/** @param {RunStatus | null} run */
function showFleet(run) {
  const wanted = JSON.stringify([replicas, run?.policy]);
  if ($("fleet").dataset.shown === wanted) return;
  $("fleet").dataset.shown = wanted;
  $("fleet").replaceChildren(fleetTable(replicas, run, location.origin));
  $("fleet-hint").textContent = fleetSummary(replicas);
  $("fleet-hint").className = replicas.some((replica) => wrongness(replica) === "bad")
    ? "hint is-bad"
    : "hint";
}

// --- completions ---------------------------------------------------------------------------------

let numGroups = FIRST_GROUPS;
let loadedAt = 0;
/** @type {ReturnType<typeof setTimeout> | null} */
let loading = null;

/** Load the newest completions, at most once per COMPLETIONS_MS and also after the last call. */
function loadCompletions() {
  if (loading) return;
  const wait = Math.max(0, loadedAt + COMPLETIONS_MS - Date.now());
  loading = setTimeout(async () => {
    try {
      if ($("follow").checked && life && !document.hidden) await readCompletions();
    } finally {
      loadedAt = Date.now();
      loading = null;
    }
  }, wait);
}

async function readCompletions() {
  let answer;
  try {
    answer = await api.getCompletions(numGroups);
  } catch (error) {
    // The poll reports the problem.
    if (error instanceof api.Away || error instanceof api.Problem) return lookNow();
    throw error;
  }
  const { groups } = answer;
  const total = groups.reduce((sum, group) => sum + group.completions.length, 0);
  completions.show(answer);
  $("completions-hint").textContent = groups.length
    ? `newest first · ${count(total)} completions of ${count(groups.length)} prompts`
    : "The first completions appear with the first batch.";
  $("more").hidden = numGroups === ALL_GROUPS || groups.length < numGroups;
}

/** @param {boolean} value */
function follow(value) {
  $("follow").checked = value;
  if (value) loadCompletions();
}

// --- dialogs -------------------------------------------------------------------------------------

/**
 * @param {string} id
 * @param {string | null} sentence null hides the element
 */
function say(id, sentence) {
  $(id).hidden = !sentence;
  $(id).textContent = sentence ?? "";
}

/**
 * Resolves once a key has been entered.
 * @returns {Promise<void>}
 */
function askForKey() {
  return new Promise((resolve) => {
    const hadKey = api.key.get() !== null;
    api.key.forget();
    for (const dialog of document.querySelectorAll("dialog")) dialog.close();
    say("key-error", hadKey ? "The trainer refused this key." : null);
    $("key").value = "";
    $("key-dialog").showModal();
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      api.key.set($("key").value.trim(), $("remember").checked);
      $("key-dialog").close();
      resolve();
    };
  });
}

/**
 * Run `work` for a form: its button is disabled meanwhile, and a problem is shown in the form.
 * @param {HTMLButtonElement} button
 * @param {string} errorId
 * @param {() => Promise<unknown>} work
 */
async function submit(button, errorId, work) {
  say(errorId, null);
  button.disabled = true;
  const label = button.textContent;
  button.textContent = `${label} …`;
  try {
    await work();
    button.closest("dialog")?.close();
    lookNow();
  } catch (error) {
    if (error instanceof api.Problem && error.status === 401)
      lookNow(); // the poll asks for the key
    else if (error instanceof api.Problem || error instanceof api.Away) say(errorId, error.message);
    else throw error;
  } finally {
    button.disabled = false;
    button.textContent = label;
  }
}

/** @param {boolean} withCurrent whether to insert the config of the current run */
async function openStart(withCurrent) {
  $("insert-current").hidden = !trainer?.run;
  say("start-error", null);
  $("config").value = sessionStorage.getItem(DRAFT) ?? "";
  $("start-dialog").showModal();
  if (withCurrent) await insertCurrent();
  $("config").focus();
}

async function insertCurrent() {
  try {
    insert(await api.getConfig());
  } catch (error) {
    if (!(error instanceof api.Problem || error instanceof api.Away)) throw error;
    say("start-error", error.message);
  }
}

/** @param {string} text */
function insert(text) {
  $("config").value = text;
  $("config").dispatchEvent(new Event("input"));
  $("config").setSelectionRange(0, 0);
  $("config").scrollTop = 0;
}

function wire() {
  const header = document.documentElement.dataset.key
    ? '-H "Authorization: Bearer $TANDEM_API_KEY" '
    : "";
  $("intro-curl").textContent = `curl ${header}--data-binary @config.yaml ${location.origin}/runs`;
  $("retry").onclick = lookNow;
  $("forget").onclick = () => {
    api.key.forget();
    lookNow();
  };
  $("theme").value = document.documentElement.dataset.theme ?? "system";
  $("theme").onchange = () => {
    document.documentElement.dataset.theme = $("theme").value;
    localStorage.setItem("tandem.theme", $("theme").value);
    curves.recolour();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => curves.recolour());
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    lookNow();
    loadCompletions();
  });
  // Escape must not close the dialog: the page needs a key.
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("button")) {
    if ("close" in button.dataset) button.onclick = () => button.closest("dialog")?.close();
  }

  $("start").onclick = () => openStart(false);
  $("resume").onclick = () => openStart(true);
  $("insert-example").onclick = () => insert(EXAMPLE);
  $("insert-current").onclick = insertCurrent;
  $("file").onchange = async () => {
    const file = $("file").files?.[0];
    if (file) insert(await file.text());
    $("file").value = ""; // so that the same file, once changed, can be chosen again
  };
  $("config").oninput = () => sessionStorage.setItem(DRAFT, $("config").value);
  $("start-form").onsubmit = (event) => {
    event.preventDefault();
    submit($("start-now"), "start-error", () => api.startRun($("config").value));
  };
  $("stop").onclick = () => {
    say("stop-error", null);
    $("stop-dialog").showModal();
  };
  $("stop-form").onsubmit = (event) => {
    event.preventDefault();
    submit($("stop-now"), "stop-error", api.stopRun);
  };

  $("unzoom").onclick = () => curves.zoom(null);
  $("follow").onchange = () => follow($("follow").checked);
  $("more").onclick = () => {
    numGroups = ALL_GROUPS;
    readCompletions();
  };
}

wire();
watch();
