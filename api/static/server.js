// Everything that is asked of the server, and what went wrong in words.

import { EventParser } from "./sse.js";

/** A request that failed, with a sentence for people. */
export class Failure extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status; // HTTP status; 0 when the connection failed
    this.retryAfter = retryAfter; // seconds until it is worth another try; 0 when unknown
  }

  get needsKey() {
    return this.status === 401;
  }
}

/** The card of the first model: id, max_model_len, quantization, modalities. */
export async function readModel(key) {
  const response = await ask("v1/models", { headers: headersFor(key) });
  return (await response.json()).data[0];
}

/** {status, detail} of the engine: "ready", "starting", ...; "unreachable" when nobody answers. */
export async function readState() {
  try {
    return await (await fetch("ready", { cache: "no-store" })).json();
  } catch {
    return { status: "unreachable" };
  }
}

/**
 * The chunks of a streamed chat completion, as they arrive: {reasoning, content, finish, usage}.
 * Throws Failure, or the AbortError of `signal`.
 */
export async function* streamChat(body, key, signal) {
  const headers = { ...headersFor(key), "Content-Type": "application/json" };
  const response = await ask("v1/chat/completions", {
    method: "POST", headers, body: JSON.stringify(body), signal,
  });
  for await (const event of events(response)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Failure(sentence(chunk.error.message));
    const choice = chunk.choices[0];
    yield {
      reasoning: choice?.delta.reasoning_content ?? "",
      content: choice?.delta.content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new Failure("The connection was lost in the middle of the answer.");
}

async function* events(response) {
  const reader = response.body.getReader(), parser = new EventParser();
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection was lost in the middle of the answer.");
    }
    if (piece.done) return;
    yield* parser.push(piece.value);
  }
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Check that it is running and that you are connected.");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const said = await response.json().then((body) => body.error?.message, () => null);
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new Failure(explain(response.status, sentence(said), retryAfter), {
    status: response.status, retryAfter,
  });
}

/** What a status means for the person at the page, with what the server itself said. */
function explain(status, said, retryAfter) {
  const when = retryAfter ? ` Try again in ${retryAfter} s.` : " Try again in a moment.";
  if (status === 401) return "This server needs an API key, or does not know the one you gave.";
  if (status === 413) return "This is more than the server accepts at once. Remove a picture or a clip.";
  if (status === 429) return `The server is busy: all its places are taken.${when}`;
  if (status === 503) return `The server cannot answer now. ${said}${when}`;
  if (status >= 500) return `The server failed. ${said}`;
  return said || `The server refused this request (HTTP ${status}).`;
}

function sentence(text) {
  const words = (text ?? "").trim();
  return words && !/[.!?。！？]$/.test(words) ? `${words}.` : words;
}

function headersFor(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}
