/**
 * A conversation is a tree of messages: an edited message or another answer is a sibling, and
 * `head` is the end of the branch that is shown.
 *
 * Message: id, parent (null at the start), role ("user", "assistant", "tool"), content, created;
 * an answer also has model, calls [{id, name, arguments}], finish (null while it comes), error,
 * usage {prompt, completion, cached, approximate} and timing {first, last} in ms; a tool's result
 * has callId and name.
 */

import { randomId } from "./dom.js";

export function newConversation(like = {}) {
  const now = Date.now();
  return {
    id: randomId(),
    title: "",
    created: now,
    updated: now,
    system: "",
    tools: "",
    model: like.model ?? "",
    sampling: { ...like.sampling },
    messages: [],
    head: null,
  };
}

/** Return the messages that are shown, oldest first. */
export function path(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const found = [];
  for (let at = byId.get(conversation.head); at; at = byId.get(at.parent)) found.push(at);
  return found.reverse();
}

/** Add a message after `parent` and show its branch. */
export function addMessage(conversation, parent, fields) {
  const message = { id: randomId(), parent, content: "", created: Date.now(), ...fields };
  conversation.messages.push(message);
  conversation.head = message.id;
  conversation.updated = Date.now();
  if (!conversation.title && message.role === "user") {
    conversation.title = titleOf(message.content);
  }
  return message;
}

function titleOf(text) {
  const [line = ""] = text.trim().split("\n");
  const letters = [...line.trim()];
  return letters.length > 60 ? `${letters.slice(0, 59).join("").trimEnd()}…` : letters.join("");
}

/** Return the versions of a message, itself among them, oldest first. */
export function versions(conversation, message) {
  return conversation.messages.filter(
    (other) => other.parent === message.parent && other.role === message.role,
  );
}

/** Show the branch of a message, down to its newest end. */
export function show(conversation, message) {
  let at = message;
  for (let next = at; next; next = conversation.messages.findLast((m) => m.parent === at.id)) {
    at = next;
  }
  conversation.head = at.id;
}

/** Return the calls of an answer that have no result on the branch that is shown. */
export function openCalls(conversation, message) {
  const shown = path(conversation);
  const answered = new Set();
  for (const { role, callId } of shown.slice(shown.indexOf(message) + 1)) {
    if (role !== "tool") break;
    answered.add(callId);
  }
  return (message.calls ?? []).filter(({ id }) => !answered.has(id));
}

/** Return the body of the request for the answer that comes after message `last`. */
export function toRequest(conversation, last) {
  const shown = path({ ...conversation, head: last });
  const messages = conversation.system.trim()
    ? [{ role: "system", content: conversation.system }]
    : [];
  for (const { role, content, calls, callId } of shown) {
    if (role === "tool") messages.push({ role, tool_call_id: callId, content });
    else if (role === "assistant" && calls?.length) {
      const named = calls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
      messages.push({ role, content: content || null, tool_calls: named });
    } else if (content || role === "user") messages.push({ role, content });
  }
  const tools = parseTools(conversation.tools);
  return {
    ...(conversation.model && { model: conversation.model }),
    messages,
    ...conversation.sampling,
    ...(tools.length && { tools }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Read the list of functions; Error: the text is not one. */
export function parseTools(text) {
  if (!text.trim()) return [];
  const tools = JSON.parse(text);
  if (!Array.isArray(tools)) throw new Error("[…]");
  tools.forEach((tool, i) => {
    if (typeof tool?.function?.name !== "string") throw new Error(`[${i}].function.name`);
  });
  return tools;
}
