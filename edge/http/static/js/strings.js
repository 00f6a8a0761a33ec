// Every text of the page, in one place for translators.

const english = {
  newChat: "New chat",
  settings: "Settings",
  welcome: "Ask the model on this device",
  welcomeHint: "Nothing you write leaves it.",
  promptLabel: "Your message",
  promptPlaceholder: "Write a message",
  promptKeys: "Enter sends, Shift+Enter starts a new line, Escape stops the answer",
  send: "Send",
  stop: "Stop",
  systemPrompt: "System prompt",
  systemPlaceholder: "The model's own",
  temperature: "Temperature (0 to 2)",
  maxTokens: "Most tokens in an answer",
  modelDefault: "The model's own",
  serverDefault: "As many as fit",
  reset: "Reset",
  done: "Done",
  copy: "Copy",
  copied: "Copied",
  retry: "Try again",
  reasoning: "Reasoning",
  connecting: "Connecting …",
  offline: "The server does not answer",
  draining: "shutting down",
  stalled: "stalled",
  degraded: "degraded",
  ready: "ready",
  running: "{running} of {slots} running",
  waiting: "{waiting} waiting",
  ahead: "{position} ahead of you, about {seconds} s",
  next: "You are next, about {seconds} s",
  stopped: "Stopped",
  cutOff: "Cut off at the token limit",
  speed: "{rate} tokens/s",
  firstToken: "first token after {seconds} s",
  tokens: "{count} tokens",
  unreachable: "The server cannot be reached.",
  unreachableHint: "Check that it is running and try again.",
  broken: "The answer ended early.",
};

/** The text for a key, with {name} replaced from values. */
export function t(key, values = {}) {
  return english[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** Fill the static texts of the document: data-t is the content, data-t-placeholder and data-t-title attributes. */
export function fillTexts(root) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  for (const node of root.querySelectorAll("[data-t-title]")) node.title = t(node.dataset.tTitle);
}
