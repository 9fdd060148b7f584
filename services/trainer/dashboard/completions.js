// The newest completions, one block per prompt, from GET /runs/current/completions.

/** @import { CompletionsResponse, RecentCompletion, RecentGroup } from "./wire.js" */

import { count, h, number } from "./text.js";

const NUM_SHOWN = 8; // completions of a group that are shown at first
const MAX_CHARACTERS = 420; // of a text; a longer one is folded
const MAX_LINES = 7; // likewise

export class Completions {
  /**
   * @param {HTMLElement} element
   * @param {() => void} onRead called when somebody unfolds a text, which must then stay in place
   */
  constructor(element, onRead) {
    this.element = element;
    this.onRead = onRead;
    this.shown = "";
  }

  /** @param {Pick<CompletionsResponse, "reward_names" | "groups">} response */
  show({ reward_names: names, groups }) {
    const wanted = JSON.stringify(
      groups.map((group) => [group.step, group.group, group.completions.length]),
    );
    if (wanted === this.shown) return;
    this.shown = wanted;
    this.element.replaceChildren(...groups.map((group) => this.#group(group, names)));
  }

  /**
   * @param {RecentGroup} group
   * @param {string[]} names
   */
  #group(group, names) {
    const rewards = group.completions.map((completion) => completion.reward);
    const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
    const areEqual = rewards.length > 1 && rewards.every((reward) => reward === rewards[0]);
    const rows = group.completions.map((completion) => this.#completion(completion, names));
    const list = h("ol", {}, ...rows.slice(0, NUM_SHOWN));
    const rest = rows.slice(NUM_SHOWN);
    /** @type {HTMLButtonElement} */
    const more = h(
      "button",
      {
        className: "quiet",
        onclick: () => {
          this.onRead();
          more.remove();
          list.append(...rest);
        },
      },
      `Show ${count(rest.length)} more completions`,
    );
    return h(
      "article",
      { className: "group" },
      h(
        "header",
        {},
        h("p", {}, `Step ${count(group.step)} · ${count(group.num_prompt_tokens)} prompt tokens`),
        this.#text(group.prompt, "prompt"),
        h(
          "p",
          {},
          `mean reward ${number(mean)}${areEqual ? ", all equal: nothing to compare" : ""}`,
        ),
      ),
      h("div", {}, list, rest.length > 0 && more),
    );
  }

  /**
   * @param {RecentCompletion} completion
   * @param {string[]} names
   */
  #completion(completion, names) {
    const parts =
      completion.rewards.length > 1 &&
      completion.rewards
        .map((value, index) => `${names[index] ?? `reward ${index + 1}`} ${number(value)}`)
        .join(" · ");
    return h(
      "li",
      { className: "completion" },
      h("span", { className: "reward", title: "reward" }, number(completion.reward)),
      this.#text(completion.text, ""),
      h("span", { className: "meta" }, facts(completion)),
      parts && h("span", { className: "parts" }, parts),
    );
  }

  /**
   * @param {string} text
   * @param {string} name
   */
  #text(text, name) {
    if (!text.trim())
      return h(
        "div",
        { className: `text ${name}` },
        h("span", { className: "nothing" }, "no text"),
      );
    const block = h("div", { className: `text ${name}`, dir: "auto" }, text);
    if (text.length <= MAX_CHARACTERS && text.split("\n").length <= MAX_LINES) return block;
    block.classList.add("clamped");
    /** @type {HTMLButtonElement} */
    const unfold = h(
      "button",
      {
        className: "quiet",
        ariaExpanded: "false",
        onclick: () => {
          const isFolded = block.classList.toggle("clamped");
          unfold.textContent = isFolded ? "Show all" : "Show less";
          unfold.ariaExpanded = String(!isFolded);
          if (!isFolded) this.onRead();
        },
      },
      "Show all",
    );
    return h("div", {}, block, unfold);
  }
}

/**
 * v12 · stop · 340 tokens. There are several versions (v12 → v13) when a newer one continued it.
 * @param {RecentCompletion} completion
 */
function facts({ segments, finish_reason: reason, num_tokens: numTokens }) {
  const versions = [...new Set(segments.map((segment) => segment.policy.version))];
  return `v${versions.map(count).join(" → v")} · ${reason} · ${count(numTokens)} tokens`;
}
