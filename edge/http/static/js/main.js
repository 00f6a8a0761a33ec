// The page: wires the composer, the conversation, the settings and the status line.

import { streamChat } from "./api.js";
import { byId } from "./dom.js";
import { leadingMessages, requestOptions, setUpSettings } from "./settings.js";
import { setUpStatus } from "./status.js";
import { fillTexts } from "./strings.js";
import { AnswerView, addUserTurn, clearTurns, setUpCopying } from "./turns.js";

const prompt = byId("prompt");
let messages = []; // the conversation as the API takes it
let running = null; // the AbortController of the answer that is being written

fillTexts(document);
setUpSettings();
setUpCopying();
const refreshStatus = setUpStatus();

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running) return;
  prompt.value = "";
  fitPrompt();
  byId("welcome").hidden = true;
  addUserTurn(text);
  byId("scroller").scrollTop = byId("scroller").scrollHeight;
  messages.push({ role: "user", content: text });
  answer();
});

prompt.addEventListener("keydown", (event) => {
  // While an input method composes, Enter chooses a character.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("composer").requestSubmit();
  }
});
prompt.addEventListener("input", fitPrompt);

byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) running?.abort();
});

byId("new-chat").addEventListener("click", () => {
  running?.abort();
  messages = [];
  clearTurns();
  byId("welcome").hidden = false;
  prompt.focus();
});

/** Let the model write the next message of the conversation. */
async function answer() {
  if (running) return;
  const conversation = messages;
  const view = new AnswerView();
  setRunning(new AbortController());
  let end = null;
  let usage = null;
  let failed = false;
  try {
    for await (const event of streamChat(chatRequest(conversation), running.signal)) {
      if (event.kind === "queued") view.showQueue(event);
      if (event.kind === "reasoning") view.addReasoning(event.text);
      if (event.kind === "text") view.addText(event.text);
      if (event.kind === "end") end = event;
      if (event.kind === "usage") usage = event.usage;
    }
    view.showFigures(end, usage);
  } catch (error) {
    failed = error.name !== "AbortError";
    if (failed) view.showProblem(error, answer);
    else view.showStopped();
  } finally {
    view.finish();
    if (!failed && view.text) conversation.push({ role: "assistant", content: view.text });
    setRunning(null);
  }
}

function chatRequest(conversation) {
  return {
    messages: [...leadingMessages(), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    ...requestOptions(),
  };
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  // The button that had the focus is gone: keep the keyboard where it is useful.
  if (controller === null && document.activeElement === document.body) prompt.focus();
  refreshStatus();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}
