/** The state of the page, and everything that changes it. Views listen. */

import { Answer } from "./answer.js";
import { fetchModels } from "./api.js";
import * as tree from "./conversation.js";
import { t } from "./i18n.js";
import { askForKey } from "./key.js";
import { notify, say } from "./notices.js";
import * as store from "./store.js";

export const app = {
  conversations: new Map(), // by id, those with messages
  current: tree.newConversation(),
  answers: new Map(), // what is being answered, by the conversation's id
  models: [],
  modelsError: null, // ApiError
};

const bus = new EventTarget();
/** Events: "list", "chat", "step" (an answer grew), "models". */
export const on = (name, listener) => bus.addEventListener(name, listener);
const emit = (name) => bus.dispatchEvent(new Event(name));

export const running = () => app.answers.get(app.current.id);

export async function start() {
  try {
    for (const conversation of await store.openStore()) {
      for (const message of conversation.messages) {
        if (message.finish === null) message.finish = "closed"; // with the page that asked
      }
      app.conversations.set(conversation.id, conversation);
    }
    store.onOtherTab(refresh);
  } catch {
    notify(t("noStorage"), { seconds: 20 });
  }
  app.current = app.conversations.get(store.preferences.get("last")) ?? freshConversation();
  emit("list");
  emit("chat");
  await loadModels();
}

async function refresh(ids) {
  for (const id of ids.filter((id) => !app.answers.has(id))) {
    const stored = await store.load(id);
    if (stored) app.conversations.set(id, stored);
    else app.conversations.delete(id);
    if (app.current.id === id) app.current = stored ?? freshConversation();
  }
  emit("list");
  emit("chat");
}

export async function loadModels() {
  for (;;) {
    try {
      app.models = await fetchModels();
      app.modelsError = null;
      break;
    } catch (error) {
      app.modelsError = error;
      if (error.kind !== "key" || !(await askForKey(true))) break;
    }
  }
  emit("models");
  emit("chat");
}

/** Return the model that answers in the conversation; undefined while none is known. */
export function currentModel() {
  return app.models.find(({ id }) => id === app.current.model) ?? app.models[0];
}

export function chooseModel(id) {
  app.current.model = id;
  store.preferences.set("model", id);
  keepCurrent();
  emit("models");
}

function freshConversation() {
  const { preferences } = store;
  return tree.newConversation({
    model: preferences.get("model"),
    sampling: preferences.get("sampling"),
  });
}

export function newChat() {
  openConversation(freshConversation());
}

export function openConversation(conversation) {
  app.current = conversation;
  store.preferences.set("last", conversation.id);
  emit("list");
  emit("chat");
  emit("models");
}

/** Store and show a change of the current conversation. */
export function keepCurrent() {
  keep(app.current);
  emit("chat");
}

/** Store a change of a conversation; one without messages is not stored. */
async function keep(conversation) {
  if (!conversation.messages.length) return;
  app.conversations.set(conversation.id, conversation);
  emit("list");
  await store.save(conversation).catch(unsaved);
}

let warned = false;

function unsaved(error) {
  if (!warned) notify(t("saveFailed", { text: error.message }), { seconds: 20 });
  warned = true;
}

/** Ask `text`, after what is shown. */
export function send(text) {
  const message = tree.addMessage(app.current, app.current.head, { role: "user", content: text });
  answer(message.id);
}

/** Answer once more; a failed answer without a word makes room. */
export function retry(message) {
  const { current } = app;
  const empty = message.role === "assistant" && !message.content && !message.calls;
  if (empty) current.messages = current.messages.filter((other) => other !== message);
  answer(message.role === "assistant" ? message.parent : message.id);
}

/** Put another version of a message in its place; a question is answered again. */
export function edit(message, text) {
  const { parent, role, model, calls } = message;
  const isAnswer = role === "assistant";
  const more = isAnswer && { model, calls, finish: "stop" };
  const changed = tree.addMessage(app.current, parent, { role, content: text, ...more });
  if (isAnswer) {
    keepCurrent();
  } else answer(changed.id);
}

export function showVersion(message) {
  tree.show(app.current, message);
  keepCurrent();
}

/** Give a tool's result; when no call is open any more, the model goes on. */
export function addResult(message, call, text) {
  const { current } = app;
  const result = { role: "tool", content: text, callId: call.id, name: call.name };
  tree.addMessage(current, current.head, result);
  if (!tree.openCalls(current, message).length) return answer(current.head);
  keepCurrent();
}

export const stop = () => running()?.stop();

async function answer(parent) {
  const conversation = app.current;
  const { id } = conversation;
  conversation.model = currentModel()?.id ?? conversation.model;
  const message = tree.addMessage(conversation, parent, {
    role: "assistant",
    model: conversation.model,
    finish: null,
  });
  const going = new Answer(conversation, message, {
    change: step,
    key: () => askForKey(true),
    keep: () => app.conversations.has(id) && store.save(conversation).catch(unsaved),
  });
  app.answers.set(id, going);
  store.preferences.set("last", id);
  keep(conversation);
  emit("chat");
  say(t("answering"));
  await going.run();
  app.answers.delete(id);
  step();
  emit("chat");
  emit("list");
  if (app.current !== conversation && app.conversations.has(id)) {
    notify(t("doneElsewhere", { title: conversation.title }));
  }
  if (message.error?.kind !== "network" && app.modelsError) loadModels();

  function step() {
    if (app.current === conversation) emit("step");
  }
}

export function rename(conversation, title) {
  conversation.title = title.trim() || conversation.title;
  keep(conversation);
}

/** Delete conversations; they come back on undo. */
export async function removeConversations(gone) {
  for (const conversation of gone) {
    app.answers.get(conversation.id)?.stop();
    app.conversations.delete(conversation.id);
  }
  if (gone.includes(app.current)) newChat();
  else emit("list");
  await store.remove(...gone.map(({ id }) => id)).catch(unsaved);
  const [{ title }] = gone;
  const text = gone.length === 1 ? t("deleted", { title }) : t("deletedAll", { n: gone.length });
  notify(text, { action: t("undo"), onaction: () => addConversations(gone) });
  say(text);
}

/** Add conversations, all or none. */
export async function addConversations(added) {
  for (const conversation of added) app.conversations.set(conversation.id, conversation);
  emit("list");
  await store.save(...added).catch(unsaved);
}
