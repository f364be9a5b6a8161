/** Talks to the server: its models, and streamed answers. */

import { events } from "./sse.js";
import { session } from "./store.js";

/**
 * Why there is no answer. `kind`: "network", "broken" (in the middle), "key", "busy", "long",
 * "model", "refused", "server" or "format". `says` is the server's own message.
 */
export class ApiError extends Error {
  constructor(kind, { says = "", requestId = "", retryAfter } = {}) {
    super(kind);
    Object.assign(this, { kind, says, requestId, retryAfter });
  }
}

const address = (path) => new URL(path, document.baseURI);

async function ask(path, options = {}) {
  const key = session.get("key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("network");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** Return what a response with an error status says, in this page's kinds. */
async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not OpenAI's shape: the status has to do.
  }
  const { status, headers } = response;
  const retryAfter = Number.parseFloat(headers.get("retry-after") ?? "");
  return new ApiError(kindOf(status, error.code), {
    says: typeof error.message === "string" ? error.message : `HTTP ${status}`,
    requestId: headers.get("x-request-id") ?? "",
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : undefined,
  });
}

function kindOf(status, code) {
  if (code === "context_length_exceeded") return "long";
  if (status === 401) return "key";
  if (status === 429 || status === 503) return "busy";
  if (code === "model_not_found") return "model";
  if (status === 404) return "format"; // of another server
  return status < 500 ? "refused" : "server";
}

/** Return the models and adapters: [{id, max_model_len, parent}]. */
export async function fetchModels(signal) {
  const response = await ask("v1/models", { signal });
  try {
    const { data } = await response.json();
    return data.map(({ id, max_model_len, parent }) => ({ id: String(id), max_model_len, parent }));
  } catch {
    throw new ApiError("format");
  }
}

/** Yield the chunks of an answer. An answer that is cut off is an ApiError("broken"). */
export async function* streamAnswer(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    throw new ApiError("format");
  }
  const requestId = response.headers.get("x-request-id") ?? "";
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        throw new ApiError("server", { says: String(chunk.error.message ?? ""), requestId });
      }
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(error instanceof SyntaxError ? "format" : "broken", { requestId });
  }
  throw new ApiError("broken", { requestId });
}
