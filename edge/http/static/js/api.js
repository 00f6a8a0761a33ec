// Talks to the server: OpenAI's API as a stream of small objects, and the health endpoint.

import { t } from "./strings.js";

/** An error with what the user can do about it. */
export class ApiError extends Error {
  constructor(message, hint) {
    super(message);
    this.hint = hint ?? "";
  }
}

/**
 * Ask for the next message of a conversation.
 *
 * Yields {kind: "queued", position, seconds}, {kind: "reasoning", text}, {kind: "text", text} and, at the end,
 * {kind: "end", reason, timings} and {kind: "usage", usage}. Throws ApiError; aborting the signal throws AbortError.
 */
export async function* streamChat(request, signal) {
  const response = await post("v1/chat/completions", request, signal);
  let ended = false;
  for await (const event of serverSentEvents(response.body)) {
    if (event.comment !== undefined) {
      yield* queuePosition(event.comment);
    } else if (event.data === "[DONE]") {
      ended = true;
    } else {
      yield* readChunk(JSON.parse(event.data));
    }
  }
  if (!ended) throw new ApiError(t("broken"), t("unreachableHint"));
}

/** The server's health, whatever its status; null when it cannot be reached. */
export async function fetchHealth() {
  try {
    const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    return await response.json();
  } catch {
    return null;
  }
}

async function post(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(t("unreachable"), t("unreachableHint"));
  }
  if (!response.ok) throw await responseError(response);
  return response;
}

async function responseError(response) {
  try {
    return toError((await response.json()).error);
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`);
  }
}

function toError(error) {
  return new ApiError(error.message, error.hint);
}

async function* serverSentEvents(body) {
  let buffer = "";
  for await (const text of textOf(body)) {
    const blocks = (buffer + text).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith(":")) yield { comment: block.slice(1).trim() };
      else if (block.startsWith("data: ")) yield { data: block.slice(6) };
    }
  }
}

async function* textOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function* queuePosition(comment) {
  const match = /^queued position=(\d+) eta_s=([\d.]+)$/.exec(comment);
  if (match) yield { kind: "queued", position: Number(match[1]), seconds: Number(match[2]) };
}

function* readChunk(chunk) {
  if (chunk.error) throw toError(chunk.error);
  if (chunk.usage) yield { kind: "usage", usage: chunk.usage };
  for (const { delta, finish_reason: reason } of chunk.choices) {
    if (delta.reasoning_content) yield { kind: "reasoning", text: delta.reasoning_content };
    if (delta.content) yield { kind: "text", text: delta.content };
    if (reason) yield { kind: "end", reason, timings: chunk.timings };
  }
}
