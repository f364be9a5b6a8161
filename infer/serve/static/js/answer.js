/** One answer on its way: asks, waits, collects what comes, and keeps it. */

import { ApiError, streamAnswer } from "./api.js";
import { toRequest } from "./conversation.js";

export const TRIES = 5; // while the server is busy
const LONGEST_WAIT = 60; // seconds
const SAVE_EVERY = 1000; // ms

export class Answer {
  /**
   * `message` (an assistant's, empty) is filled in. `hooks`: `change()` after each step,
   * `keep()` stores the conversation, `key()` asks the user for a key and returns whether there is
   * a new one.
   */
  constructor(conversation, message, hooks) {
    Object.assign(this, { conversation, message, hooks });
    this.controller = new AbortController();
    this.phase = "waiting"; // then "writing"; "busy" until `again`
    this.again = 0;
    this.seen = performance.now(); // when something last happened
    this.deltas = 0;
    this.saved = 0;
  }

  stop() {
    this.controller.abort();
  }

  /** Run to the end; every way to end is written into the message. */
  async run() {
    const { message } = this;
    try {
      await this.tryAgainWhileBusy();
      message.finish ??= "stop";
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else if (error.kind !== "broken" || !message.finish) {
        if (!(error instanceof ApiError)) console.error(error);
        const { kind = "format", says = "", requestId = "" } = error;
        message.finish = "error";
        message.error = { kind, says, requestId };
      }
    }
    if (!message.usage && this.deltas) {
      message.usage = { completion: this.deltas, approximate: true };
    }
    await this.keep();
  }

  async tryAgainWhileBusy() {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.stream();
      } catch (error) {
        if (error.kind === "key" && (await this.hooks.key())) continue;
        if (error.kind !== "busy" || attempt === TRIES) throw error;
        await this.pause(Math.min(Math.max(error.retryAfter ?? 2 ** attempt, 0.1), LONGEST_WAIT));
      }
    }
  }

  async pause(seconds) {
    const { signal } = this.controller;
    this.phase = "busy";
    this.again = performance.now() + seconds * 1000;
    this.hooks.change();
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, seconds * 1000);
      signal.addEventListener("abort", () => {
        clearTimeout(timer);
        reject(signal.reason);
      });
    });
    this.phase = "waiting";
    this.seen = performance.now();
    this.hooks.change();
  }

  async stream() {
    const { conversation, message } = this;
    const started = performance.now();
    const body = toRequest(conversation, message.parent);
    for await (const chunk of streamAnswer(body, this.controller.signal)) {
      this.seen = performance.now();
      if (chunk.usage) message.usage = usageOf(chunk.usage);
      if (typeof chunk.model === "string") message.model = chunk.model;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (this.take(choice.delta ?? {})) {
        this.phase = "writing";
        this.deltas += 1;
        const last = Math.round(this.seen - started);
        message.timing = { first: message.timing?.first ?? last, last };
      }
      if (choice.finish_reason) message.finish = endingOf(choice);
      this.hooks.change();
      if (this.seen - this.saved > SAVE_EVERY) this.keep();
    }
  }

  /** Add a piece of the answer; return whether there was any. */
  take({ content, tool_calls: pieces = [] }) {
    const { message } = this;
    if (typeof content === "string") message.content += content;
    for (const { index = 0, id, function: part = {} } of pieces ?? []) {
      message.calls ??= [];
      const call = (message.calls[index] ??= { id: "", name: "", arguments: "" });
      if (id) call.id = id;
      call.name += part.name ?? "";
      call.arguments += part.arguments ?? "";
    }
    return Boolean(content || pieces?.length);
  }

  async keep() {
    this.saved = performance.now();
    this.conversation.updated = Date.now();
    await this.hooks.keep();
  }
}

/** The API knows few reasons; the server says more in `stop_reason`. */
function endingOf({ finish_reason, stop_reason }) {
  return ["loop", "observation"].includes(stop_reason) ? stop_reason : String(finish_reason);
}

function usageOf({ prompt_tokens, completion_tokens, prompt_tokens_details }) {
  return {
    prompt: prompt_tokens ?? 0,
    completion: completion_tokens ?? 0,
    cached: prompt_tokens_details?.cached_tokens ?? 0,
  };
}

/** Return the tokens per second between the first token and the last, or null. */
export function rateOf({ usage, timing }) {
  const seconds = timing ? (timing.last - timing.first) / 1000 : 0;
  return usage && usage.completion > 1 && seconds > 0 ? (usage.completion - 1) / seconds : null;
}
