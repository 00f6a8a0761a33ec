// What a conversation looks like: one list item for each turn.

import { byId, element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { t } from "./strings.js";

/** Show what the user said. */
export function addUserTurn(text) {
  byId("turns").append(element("li", { className: "turn user", textContent: text }));
}

/** Remove all turns. */
export function clearTurns() {
  byId("turns").replaceChildren();
}

/** One answer, while it grows and afterwards. */
export class AnswerView {
  #text = "";
  #reasoning = "";
  #frame = 0;
  #reasoningText = element("div");
  #reasoningBox = element("details", { className: "reasoning", hidden: true },
    element("summary", { textContent: t("reasoning") }), this.#reasoningText);
  #body = element("div", { className: "markdown waiting" });
  #note = element("div", { className: "note" });
  #item = element("li", { className: "turn assistant" }, this.#reasoningBox, this.#body, this.#note);

  constructor() {
    byId("turns").append(this.#item);
    byId("turns").ariaBusy = "true";
  }

  /** The answer so far. */
  get text() {
    return this.#text;
  }

  /** The user waits behind others. */
  showQueue({ position, seconds }) {
    this.#note.textContent = t(position > 0 ? "ahead" : "next", { position, seconds: Math.max(1, Math.round(seconds)) });
  }

  /** More of the answer. */
  addText(text) {
    this.#text += text;
    this.#renderSoon();
  }

  /** More of the model's thoughts before the answer. */
  addReasoning(text) {
    this.#reasoning += text;
    this.#renderSoon();
  }

  /** The answer is complete: show how fast it was. */
  showFigures(end, usage) {
    const parts = [];
    if (end.reason === "length") parts.push(t("cutOff"));
    const { decode_tokens_per_second: rate, ttft_ms: ttft } = end.timings;
    if (rate > 0) parts.push(t("speed", { rate: rate.toFixed(1) }));
    parts.push(t("firstToken", { seconds: (ttft / 1000).toFixed(2) }));
    if (usage) parts.push(t("tokens", { count: usage.completion_tokens }));
    this.#note.textContent = parts.join(" · ");
  }

  /** The user stopped it. */
  showStopped() {
    this.#note.textContent = t("stopped");
  }

  /** It failed: say why and what helps. */
  showProblem(error, retry) {
    const button = element("button", { type: "button", className: "quiet small", textContent: t("retry") });
    button.addEventListener("click", () => {
      this.#item.remove();
      retry();
    });
    this.#note.replaceChildren();
    const problem = element("div", { className: "problem", role: "alert" },
      element("p", {}, element("strong", { textContent: error.message })),
      element("p", { textContent: error.hint ?? "" }), button);
    this.#item.append(problem);
  }

  /** Nothing more comes. */
  finish() {
    cancelAnimationFrame(this.#frame);
    this.#render();
    this.#body.classList.remove("waiting");
    byId("turns").ariaBusy = "false";
  }

  #renderSoon() {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#render();
    });
  }

  #render() {
    const scroller = byId("scroller");
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    if (this.#text || this.#reasoning) this.#body.classList.remove("waiting");
    this.#reasoningBox.hidden = !this.#reasoning;
    this.#reasoningText.textContent = this.#reasoning;
    this.#body.replaceChildren(renderMarkdown(this.#text));
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  }
}

/** Let the copy buttons of code blocks work. */
export function setUpCopying() {
  byId("turns").addEventListener("click", async ({ target }) => {
    if (target.dataset?.copy === undefined) return;
    const code = target.closest("figure").querySelector("code");
    if (await copied(code)) target.textContent = t("copied");
    setTimeout(() => { target.textContent = t("copy"); }, 1500);
  });
}

async function copied(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    // Without HTTPS there is no clipboard: select the text for Ctrl+C.
    getSelection().selectAllChildren(code);
    return false;
  }
}
