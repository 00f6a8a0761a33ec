// What a conversation looks like: one list item for each message.

import { button, element, problem, setText } from "../dom.js";
import { number, t } from "../i18n.js";
import { MarkdownView } from "../markdown/markdown.js";

const RENDER_EVERY_MS = 50;

/** What the user said. actions: {edit(text)}. */
export function userTurn(message, actions) {
  const text = element("div", { className: "bubble", textContent: message.content });
  const item = element("li", { className: "turn user" }, text);
  const edit = button("edit", () => item.replaceChildren(editor(message.content, actions.edit, () => {
    item.replaceChildren(text, note);
    edit.focus();
  })));
  const note = element("div", { className: "note" }, copyButton(() => message.content), edit);
  item.append(note);
  return item;
}

function editor(content, save, cancel) {
  const field = element("textarea", { value: content, rows: Math.min(12, content.split("\n").length + 1) });
  field.setAttribute("aria-label", t("edit"));
  const form = element("form", { className: "editor" }, field, element("p", { className: "actions" },
    element("button", { type: "submit", className: "primary", textContent: t("send") }), button("cancel", cancel, "quiet")));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) save(field.value.trim());
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation(); // else it would stop the answer that is being written
      cancel();
    }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  queueMicrotask(() => field.focus());
  return form;
}

/** One answer, while it grows and afterwards. */
export class AnswerTurn {
  #message;
  #retry;
  #timer = 0;
  #reasoningText = element("div");
  #reasoningBox = element("details", { className: "reasoning", hidden: true },
    element("summary", { textContent: t("reasoning") }), this.#reasoningText);
  #body = element("div", { className: "markdown" });
  #markdown = new MarkdownView(this.#body);
  #figures = element("span", { className: "figures" });
  #note = element("div", { className: "note" });
  /** The list item. */
  node = element("li", { className: "turn assistant" }, this.#reasoningBox, this.#body, this.#note);

  /** message: the answer, which others change. retry: writes it anew. */
  constructor(message, retry) {
    this.#message = message;
    this.#retry = retry;
    this.render();
  }

  /** The message has changed: show it soon. */
  update() {
    this.#timer ||= setTimeout(() => {
      this.#timer = 0;
      this.render();
    }, RENDER_EVERY_MS);
  }

  /** The user waits behind others. */
  showQueue({ position, seconds }) {
    setText(this.#figures, t(position > 0 ? "ahead" : "next", { position, seconds: Math.max(1, Math.round(seconds)) }));
  }

  /** Show the message as it is now. */
  render() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const { content, reasoning, state } = this.#message;
    const scroller = this.node.closest(".scroller");
    const atEnd = scroller && scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    this.#body.classList.toggle("waiting", state === "running" && !content && !reasoning);
    this.#reasoningBox.hidden = !reasoning;
    this.#reasoningText.textContent = reasoning ?? "";
    this.#markdown.show(content);
    if (state === "running") this.#note.replaceChildren(this.#figures);
    else this.#renderNote();
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  }

  #renderNote() {
    const { content, error, figures, state } = this.#message;
    this.node.querySelector(".problem")?.remove();
    if (error) {
      this.node.append(problem(error, button("retry", this.#retry)));
      this.#note.replaceChildren();
      return;
    }
    this.#figures.textContent = state === "stopped" ? t("stopped") : describe(figures ?? {});
    this.#note.replaceChildren(this.#figures, copyButton(() => content), button("retry", this.#retry));
  }
}

/** How fast an answer was and what it cost, in one line. */
function describe({ reason, rate, ttft_ms: ttft, tokens, energy_j: energy }) {
  const parts = [];
  if (reason === "length") parts.push(t("cutOff"));
  if (rate > 0) parts.push(t("speed", { rate: number(rate, 1) }));
  if (ttft >= 0) parts.push(t("firstToken", { seconds: number(ttft / 1000, 2) }));
  if (tokens >= 0) parts.push(t("tokens", { count: number(tokens) }));
  if (energy >= 0) parts.push(t("energy", { joules: number(energy, 1) }));
  return parts.join(" · ");
}

function copyButton(text) {
  return button("copy", ({ target }) => copy(target, text(), target.closest(".turn").querySelector(".bubble, .markdown")));
}

/** Let the copy buttons of code blocks in a list work. */
export function setUpCopying(list) {
  list.addEventListener("click", ({ target }) => {
    if (!target.classList?.contains("copy-code")) return;
    const code = target.closest("figure").querySelector("code");
    copy(target, code.textContent, code);
  });
}

async function copy(clicked, text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS there is no clipboard: select the text for Ctrl+C.
    getSelection().selectAllChildren(node);
    return;
  }
  clicked.textContent = t("copied");
  setTimeout(() => { clicked.textContent = t("copy"); }, 1500);
}
