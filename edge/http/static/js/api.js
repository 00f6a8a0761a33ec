// Talks to the server: JSON, server-sent events, and the key where the server wants one.

import { t } from "./i18n.js";
import { askForKey, key } from "./key.js";

/** An error with what the user can do about it. */
export class ApiError extends Error {
  constructor(message, { hint = "", status = 0, code = "" } = {}) {
    super(message);
    this.hint = hint ?? "";
    this.status = status;
    this.code = code;
  }
}

/**
 * The JSON that a path answers with.
 *
 * ask: whether a missing key may be asked for; a poll in the background must not.
 */
export async function getJson(path, { ask = true, signal } = {}) {
  return (await send(path, { cache: "no-store", signal: signal ?? AbortSignal.timeout(10000) }, ask)).json();
}

/** Send JSON (or nothing) with a method; the JSON of the answer. */
export async function sendJson(method, path, body, { signal } = {}) {
  const response = await send(path, jsonRequest(method, body, signal), true);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** Post JSON; yields the events of the answer: {data} with parsed JSON, or {comment}. Ends with [DONE]. */
export async function* postForEvents(path, body, signal) {
  const response = await send(path, jsonRequest("POST", body, signal), true);
  for await (const block of blocks(response.body)) {
    if (block.startsWith(":")) {
      yield { comment: block.slice(1).trim() };
    } else if (block === "data: [DONE]") {
      return;
    } else if (block.startsWith("data: ")) {
      const data = JSON.parse(block.slice(6));
      if (data.error) throw toError(data.error);
      yield { data };
    }
  }
  throw new ApiError(t("broken"), { hint: t("unreachableHint") });
}

function jsonRequest(method, body, signal) {
  if (body === undefined) return { method, signal };
  return { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal };
}

async function send(path, options, ask) {
  let response = await fetchWithKey(path, options);
  while (response.status === 401 && ask && (await askForKey())) response = await fetchWithKey(path, options);
  if (!response.ok) throw await responseError(response);
  return response;
}

async function fetchWithKey(path, options) {
  const authorization = key() ? { authorization: `Bearer ${key()}` } : {};
  try {
    return await fetch(path, { ...options, headers: { ...options.headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(t("unreachable"), { hint: t("unreachableHint") });
  }
}

async function responseError(response) {
  try {
    return toError((await response.json()).error, response.status);
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`, { status: response.status });
  }
}

function toError(error, status = 0) {
  return new ApiError(error.message, { hint: error.hint, status, code: error.code });
}

async function* blocks(body) {
  let buffer = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const complete = (buffer + value).split("\n\n");
    buffer = complete.pop();
    yield* complete;
  }
}
