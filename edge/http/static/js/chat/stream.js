// OpenAI's chat API as a stream of small objects.

import { postForEvents } from "../api.js";

const QUEUED = /^queued position=(\d+) eta_s=([\d.]+)$/;

/**
 * Ask for the next message of a conversation.
 *
 * Yields {kind: "queued", position, seconds}, {kind: "reasoning", text}, {kind: "text", text} and, towards the end,
 * {kind: "end", reason, timings} and {kind: "usage", usage}. Throws ApiError; aborting the signal throws AbortError.
 */
export async function* streamChat(request, signal) {
  for await (const { data, comment } of postForEvents("v1/chat/completions", request, signal)) {
    if (data) {
      yield* readChunk(data);
    } else {
      const match = QUEUED.exec(comment);
      if (match) yield { kind: "queued", position: Number(match[1]), seconds: Number(match[2]) };
    }
  }
}

function* readChunk(chunk) {
  if (chunk.usage) yield { kind: "usage", usage: chunk.usage };
  for (const { delta, finish_reason: reason } of chunk.choices) {
    if (delta.reasoning_content) yield { kind: "reasoning", text: delta.reasoning_content };
    if (delta.content) yield { kind: "text", text: delta.content };
    if (reason) yield { kind: "end", reason, timings: chunk.timings ?? {} };
  }
}
