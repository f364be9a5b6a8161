/** Export and import of conversations, as a file of JSON. */

import { parseTools } from "./conversation.js";
import { el, randomId } from "./dom.js";
import { t } from "./i18n.js";
import { CONTROLS, isValid } from "./sampling.js";

const FORMAT = "glm2-jax chat";
const LARGEST = 50 * 2 ** 20;

export function exportConversations(conversations) {
  const content = { format: FORMAT, version: 1, conversations };
  const blob = new Blob([JSON.stringify(content, null, 1)], { type: "application/json" });
  const href = URL.createObjectURL(blob);
  const day = new Date().toISOString().slice(0, 10);
  const link = el("a", { href, download: `glm-chat-${day}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

/** Read an exported file; Error, with a message for the user: it is not one. */
export async function importConversations(file, taken) {
  if (file.size > LARGEST) throw new Error(t("tooLarge"));
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    throw new Error(t("notJson"));
  }
  if (content?.format !== FORMAT || content.version !== 1) throw new Error(t("notExport"));
  demand(Array.isArray(content.conversations), "conversations");
  return content.conversations.map((one, i) => {
    const conversation = readConversation(one, `conversations[${i}]`);
    if (taken.has(conversation.id)) conversation.id = randomId();
    return conversation;
  });
}

function demand(right, path) {
  if (!right) throw new Error(t("badPart", { path }));
}

const isText = (value) => typeof value === "string";
const isTime = (value) => Number.isFinite(value) && value > 0 && value < 8.64e15;
const isCount = (value) => Number.isFinite(value) && value >= 0;

/** Return a conversation made of the known parts of `one` alone, each checked. */
function readConversation(one, at) {
  demand(one && typeof one === "object", at);
  for (const name of ["id", "title", "system", "tools", "model"])
    demand(isText(one[name]), `${at}.${name}`);
  demand(one.id, `${at}.id`);
  demand(isTime(one.created), `${at}.created`);
  demand(isTime(one.updated), `${at}.updated`);
  demand(Array.isArray(one.messages) && one.messages.length, `${at}.messages`);
  try {
    parseTools(one.tools);
  } catch {
    demand(false, `${at}.tools`);
  }
  const ids = new Set();
  const messages = one.messages.map((message, i) =>
    readMessage(message, ids, `${at}.messages[${i}]`),
  );
  demand(ids.has(one.head), `${at}.head`);
  const sampling = {};
  for (const control of CONTROLS) {
    const value = one.sampling?.[control.name];
    if (value === undefined) continue;
    demand(isValid(control, value), `${at}.sampling.${control.name}`);
    sampling[control.name] = value;
  }
  const { id, title, created, updated, system, tools, model, head } = one;
  return { id, title, created, updated, system, tools, model, sampling, messages, head };
}

/** `ids` are those of the messages before: a parent comes first, so there is no circle. */
function readMessage(one, ids, at) {
  demand(one && typeof one === "object", at);
  const { id, parent, role, content, created } = one;
  demand(isText(id) && id && !ids.has(id), `${at}.id`);
  demand(parent === null || ids.has(parent), `${at}.parent`);
  demand(["user", "assistant", "tool"].includes(role), `${at}.role`);
  demand(isText(content), `${at}.content`);
  demand(isTime(created), `${at}.created`);
  ids.add(id);
  const message = { id, parent, role, content, created };
  for (const name of role === "tool" ? ["callId", "name"] : []) {
    demand(isText(one[name]), `${at}.${name}`);
    message[name] = one[name];
  }
  return role === "assistant" ? Object.assign(message, readAnswer(one, at)) : message;
}

function readAnswer({ model, finish, error, calls, usage, timing }, at) {
  demand(isText(model), `${at}.model`);
  demand(finish === null || isText(finish), `${at}.finish`); // null: exported on its way
  const answer = { model, finish: finish ?? "closed" };
  if (error !== undefined)
    answer.error = readParts(error, ["kind", "says", "requestId"], isText, `${at}.error`);
  if (calls !== undefined) {
    demand(Array.isArray(calls), `${at}.calls`);
    answer.calls = calls.map((call, i) =>
      readParts(call, ["id", "name", "arguments"], isText, `${at}.calls[${i}]`),
    );
  }
  if (usage !== undefined) {
    const approximate = usage?.approximate === true;
    const names = approximate ? ["completion"] : ["prompt", "completion", "cached"];
    answer.usage = readParts(usage, names, isCount, `${at}.usage`);
    if (approximate) answer.usage.approximate = true;
  }
  if (timing !== undefined)
    answer.timing = readParts(timing, ["first", "last"], isCount, `${at}.timing`);
  return answer;
}

function readParts(one, names, isRight, at) {
  demand(one && typeof one === "object", at);
  for (const name of names) demand(isRight(one[name]), `${at}.${name}`);
  return Object.fromEntries(names.map((name) => [name, one[name]]));
}
