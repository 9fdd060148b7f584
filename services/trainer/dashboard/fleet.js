// The fleet as a table, from GET /replicas. Colour means that something is wrong.

/** @import { ReplicaStatus, RunStatus } from "./wire.js" */

import { NONE, count, h, number } from "./text.js";

/**
 * How much is wrong with a replica: "bad", "warn" or "". Nothing is wrong with one that has not
 * answered yet.
 * @param {ReplicaStatus} replica
 */
export function wrongness(replica) {
  const isLost = replica.state === "discovered" && replica.num_failures > 0;
  if (isLost || ["quarantined", "gone"].includes(replica.state)) return "bad";
  return replica.num_failures > 0 ? "warn" : "";
}

const COLUMNS = [
  ["Replica"],
  ["State"],
  ["Policy"],
  ["Load", "num"],
  ["Last sync", "num"],
  ["Conformance gap", "num"],
  ["Failures", "num"],
  ["Detail"],
];

/**
 * @param {ReplicaStatus[]} replicas
 * @param {RunStatus | null} run
 * @param {string} trainerUrl
 */
export function fleetTable(replicas, run, trainerUrl) {
  if (!replicas.length) {
    return h(
      "div",
      { className: "empty" },
      "There are no replicas. Start one with ",
      h("code", {}, `ROLLOUT_TRAINER_URL=${trainerUrl}`),
      ", or list it in the trainer’s ",
      h("code", {}, "TRAINER_ROLLOUT_URLS"),
      ".",
    );
  }
  const heads = COLUMNS.map(([name, kind = ""]) =>
    h("th", { scope: "col", className: kind }, name),
  );
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, ...heads)),
    h("tbody", {}, ...replicas.map((replica) => row(replica, run))),
  );
}

/**
 * @param {ReplicaStatus} replica
 * @param {RunStatus | null} run
 */
function row(replica, run) {
  const wrong = wrongness(replica);
  /** @type {(content: Node | string, note?: string, more?: Record<string, string>) => Node} */
  const cell = (content, note = "", more = {}) =>
    h("td", more, content, note && h("small", {}, ` ${note}`));
  const num = { className: "num" };
  const behind =
    run && replica.policy && replica.policy.run_id === run.policy.run_id
      ? run.policy.version - replica.policy.version
      : 0;
  return h(
    "tr",
    { className: wrong ? "wrong" : "", "data-state": replica.state, "data-id": replica.id },
    cell(
      h("span", { className: "mono" }, replica.id),
      replica.source === "registered" ? "registered" : "",
    ),
    cell(h("span", { className: wrong && `is-${wrong}` }, replica.state)),
    replica.policy
      ? cell(`v${count(replica.policy.version)}`, behind > 0 ? `${count(behind)} behind` : "", {
          title: replica.policy.run_id,
        })
      : cell(NONE),
    cell(
      count(replica.num_outstanding_completions),
      replica.num_outstanding_tokens
        ? `≤\u202f${count(replica.num_outstanding_tokens)} tokens`
        : "",
      num,
    ),
    replica.last_sync_s === null
      ? cell(NONE, "", num)
      : cell(number(replica.last_sync_s), "s", num),
    replica.logprob_gap === null
      ? cell(NONE, "", num)
      : cell(number(replica.logprob_gap), "nats", num),
    cell(
      h("span", { className: replica.num_failures ? "is-warn" : "" }, count(replica.num_failures)),
      "",
      num,
    ),
    cell(replica.detail, "", { className: "detail" }),
  );
}

/** @param {ReplicaStatus[]} replicas */
export function fleetSummary(replicas) {
  if (!replicas.length) return "";
  const serving = replicas.filter((replica) => replica.state === "serving").length;
  return `${count(serving)} of ${count(replicas.length)} serving`;
}
