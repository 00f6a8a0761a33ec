// The chat: the conversation on display, the composer, and the answer that is being written.

import { ApiError, getJson } from "../api.js";
import { byId, element, problem, setText } from "../dom.js";
import { onLanguageChange, t } from "../i18n.js";
import { dropSchema, leadingMessages, onSettingsChange, requestOptions, usesSchema } from "../settings.js";
import { load, save } from "../storage.js";
import { exportFile, readFile } from "./files.js";
import { renderSidebar, setUpSidebar } from "./sidebar.js";
import { newConversation, openStore } from "./store.js";
import { streamChat } from "./stream.js";
import { AnswerTurn, setUpCopying, userTurn } from "./turns.js";

const CURRENT = "qwedge.conversation";
const SAVE_EVERY_MS = 2000;
const MAX_TITLE = 60;

/** Connect the view; gives what the router wants of it. */
export async function chatView(refreshStatus) {
  const chat = new Chat(await openStore(), refreshStatus);
  await chat.start();
  return { show: () => chat.show(), hide: () => {} };
}

class Chat {
  #store;
  #refreshStatus;
  #conversations = [];
  #current = newConversation();
  #turns = new Map(); // assistant message -> AnswerTurn, of the conversation on display
  #running = null; // {controller, conversation, message} of the answer that is being written
  #savedAt = 0;
  #closeSidebar;

  constructor(store, refreshStatus) {
    this.#store = store;
    this.#refreshStatus = refreshStatus;
  }

  async start() {
    this.#conversations = await this.#store.list();
    const wanted = this.#conversations.find(({ id }) => id === load(CURRENT));
    if (wanted) this.#current = wanted;
    this.#closeSidebar = setUpSidebar();
    setUpCopying(byId("turns"));
    this.#connectComposer();
    this.#connectButtons();
    onLanguageChange(() => this.#render());
    onSettingsChange(() => this.#renderSchema());
    this.#render();
  }

  show() {
    byId("prompt").focus();
    this.#scrollToEnd();
    this.#fillModels();
  }

  // --- what the user does -------------------------------------------------------------------------------------------

  #connectComposer() {
    const prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = prompt.value.trim();
      if (!text || this.#running) return;
      prompt.value = "";
      fitPrompt();
      this.#ask(text);
    });
    prompt.addEventListener("keydown", (event) => {
      // While an input method composes, Enter chooses a character.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        byId("composer").requestSubmit();
      }
    });
    prompt.addEventListener("input", fitPrompt);
    byId("stop").addEventListener("click", () => this.#stop());
    // A page that is left must not keep the device busy.
    addEventListener("pagehide", () => this.#stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) this.#stop();
    });
  }

  #connectButtons() {
    byId("new-chat").addEventListener("click", () => this.#open(newConversation()));
    byId("drop-schema").addEventListener("click", dropSchema);
    byId("export").addEventListener("click", () => exportFile(this.#conversations));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", async ({ target }) => {
      const [file] = target.files;
      target.value = "";
      if (file) await this.#import(file);
    });
  }

  #stop() {
    this.#running?.controller.abort();
  }

  async #import(file) {
    byId("storage-problem").replaceChildren();
    try {
      for (const conversation of await readFile(file)) await this.#store.put(conversation);
    } catch (error) {
      byId("storage-problem").replaceChildren(problem(error));
    }
    this.#conversations = await this.#store.list();
    this.#renderList();
  }

  #open(conversation) {
    this.#current = conversation;
    save(CURRENT, conversation.id);
    this.#closeSidebar();
    this.#render();
    this.#scrollToEnd();
    byId("prompt").focus();
  }

  async #rename(id, title) {
    const conversation = this.#conversations.find((each) => each.id === id);
    conversation.title = title;
    await this.#store.put(conversation);
    this.#renderList();
  }

  async #remove(id) {
    if (this.#running?.conversation.id === id) this.#stop();
    this.#conversations = this.#conversations.filter((each) => each.id !== id);
    await this.#store.remove(id);
    if (this.#current.id === id) this.#open(newConversation());
    else this.#renderList();
  }

  // --- asking -------------------------------------------------------------------------------------------------------

  #ask(text) {
    const conversation = this.#current;
    conversation.messages.push({ role: "user", content: text });
    conversation.title ||= titleOf(text);
    if (!this.#conversations.includes(conversation)) this.#conversations.unshift(conversation);
    save(CURRENT, conversation.id);
    this.#answer();
  }

  /** The user's message at an index was changed: what follows it is void. */
  #edit(index, text) {
    if (this.#running) return;
    this.#current.messages.length = index;
    this.#ask(text);
  }

  /** Write the answer at an index anew. */
  #retry(index) {
    if (this.#running) return;
    this.#current.messages.length = index;
    this.#answer();
  }

  /** Let the model write the next message of the conversation on display. */
  async #answer() {
    const conversation = this.#current;
    const request = this.#request(conversation);
    const message = { role: "assistant", content: "", state: "running" };
    conversation.messages.push(message);
    const controller = new AbortController();
    this.#setRunning({ controller, conversation, message });
    this.#render();
    this.#scrollToEnd();
    await this.#keep(conversation);
    try {
      for await (const event of streamChat(request, controller.signal)) this.#take(event, conversation, message);
      delete message.state;
    } catch (error) {
      const stopped = error.name === "AbortError";
      message.state = stopped ? "stopped" : "failed";
      if (!stopped) message.error = { message: error.message, hint: error.hint ?? "" };
      if (error.code === "model_not_found") this.#fillModels(); // somebody has switched to another one
    }
    this.#turns.get(message)?.render();
    this.#setRunning(null);
    await this.#keep(conversation);
  }

  #request(conversation) {
    // A failed answer without text says nothing to the model.
    const said = conversation.messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
    return {
      model: byId("model-choice").hidden ? undefined : byId("model").value,
      messages: [...leadingMessages(), ...said],
      stream: true,
      stream_options: { include_usage: true },
      ...requestOptions(),
    };
  }

  #take(event, conversation, message) {
    const turn = this.#turns.get(message);
    if (event.kind === "queued") turn?.showQueue(event);
    if (event.kind === "reasoning") message.reasoning = (message.reasoning ?? "") + event.text;
    if (event.kind === "text") message.content += event.text;
    if (event.kind === "end") message.figures = { ...message.figures, ...figures(event) };
    if (event.kind === "usage") message.figures = { ...message.figures, tokens: event.usage.completion_tokens };
    if (event.kind !== "queued") turn?.update();
    if (Date.now() - this.#savedAt > SAVE_EVERY_MS) this.#keep(conversation);
  }

  #setRunning(running) {
    this.#running = running;
    byId("send").hidden = running !== null;
    byId("stop").hidden = running === null;
    byId("live").ariaBusy = String(running !== null);
    // The button that had the focus is gone: keep the keyboard where it is useful.
    if (running === null && document.activeElement === document.body) byId("prompt").focus();
    this.#refreshStatus();
  }

  /** Save a conversation, unless it was removed meanwhile. */
  async #keep(conversation) {
    if (!this.#conversations.includes(conversation)) return;
    this.#savedAt = Date.now();
    conversation.updated = this.#savedAt / 1000;
    this.#conversations.sort((a, b) => b.updated - a.updated);
    this.#renderList();
    try {
      await this.#store.put(withoutRunning(conversation));
    } catch {
      byId("storage-problem").replaceChildren(problem(new ApiError(t("keepFailed"), { hint: t("keepHint") })));
    }
  }

  // --- what is to be seen -------------------------------------------------------------------------------------------

  #render() {
    this.#turns.clear();
    const { messages } = this.#current;
    byId("turns").replaceChildren(...messages.map((message, index) => this.#turn(message, index)));
    byId("welcome").hidden = messages.length > 0;
    this.#renderList();
    this.#renderSchema();
  }

  #turn(message, index) {
    if (message.role === "user") return userTurn(message, { edit: (text) => this.#edit(index, text) });
    const turn = new AnswerTurn(message, () => this.#retry(index));
    this.#turns.set(message, turn);
    return turn.node;
  }

  #renderList() {
    setText(byId("title"), this.#current.title || t("newChat"));
    byId("export").disabled = this.#conversations.length === 0;
    renderSidebar(this.#conversations, this.#current.id, {
      select: (id) => this.#open(this.#conversations.find((each) => each.id === id)),
      rename: (id, title) => this.#rename(id, title),
      remove: (id) => this.#remove(id),
    });
  }

  #renderSchema() {
    byId("schema-note").hidden = !usesSchema();
  }

  #scrollToEnd() {
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
  }

  async #fillModels() {
    let models = [];
    try {
      models = (await getJson("v1/models")).data;
    } catch {
      return; // the status line says that nobody answers
    }
    const select = byId("model");
    const before = select.value;
    select.replaceChildren(...models.map(({ id }) => element("option", { value: id, textContent: id })));
    if (models.some(({ id }) => id === before)) select.value = before;
    byId("model-choice").hidden = models.length < 2;
  }
}

function figures({ reason, timings }) {
  const kept = { reason, rate: timings.decode_tokens_per_second, ttft_ms: timings.ttft_ms, energy_j: timings.energy_j };
  return Object.fromEntries(Object.entries(kept).filter(([, value]) => value !== undefined && value !== null));
}

/** The beginning of a question, in whole words. */
function titleOf(text) {
  const line = text.replace(/\s+/g, " ");
  if (line.length <= MAX_TITLE) return line;
  const cut = line.slice(0, MAX_TITLE);
  return `${cut.slice(0, cut.lastIndexOf(" ")) || cut} …`;
}

/** The conversation as it is kept: after a reload, an answer that was being written counts as stopped. */
function withoutRunning(conversation) {
  const messages = conversation.messages.map((each) => (each.state === "running" ? { ...each, state: "stopped" } : each));
  return { ...conversation, messages };
}

function fitPrompt() {
  const prompt = byId("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}
