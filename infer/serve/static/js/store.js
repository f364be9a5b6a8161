/** Where conversations (IndexedDB), preferences (localStorage) and the key (sessionStorage) stay. */

const DATABASE = "glm";
const STORE = "conversations";
let database = null;

/** Open the database and return all conversations; Error: this browser does not store any here. */
export async function openStore() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  database = await settled(request);
  database.onversionchange = () => database.close();
  return settled(database.transaction(STORE).objectStore(STORE).getAll());
}

/** Put conversations in place, all or none. Without a database they last as long as the page. */
export async function save(...conversations) {
  if (!database) return;
  const transaction = database.transaction(STORE, "readwrite");
  for (const conversation of conversations) transaction.objectStore(STORE).put(conversation);
  await finished(transaction);
  const isGoing = ({ messages }) => messages.some(({ finish }) => finish === null);
  const done = conversations.filter((conversation) => !isGoing(conversation));
  channel?.postMessage(done.map(({ id }) => id)); // other tabs see complete answers only
}

export async function remove(...ids) {
  if (!database) return;
  const transaction = database.transaction(STORE, "readwrite");
  for (const id of ids) transaction.objectStore(STORE).delete(id);
  await finished(transaction);
  channel?.postMessage(ids);
}

/** Return a stored conversation, or undefined. */
export const load = (id) => settled(database.transaction(STORE).objectStore(STORE).get(id));

const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("glm") : null;

/** Call `listener` with the ids that another tab has changed. */
export function onOtherTab(listener) {
  channel?.addEventListener("message", ({ data }) => listener(data));
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction) {
  transaction.commit(); // at once, also when the page is left now
  return new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
}

/** A small dictionary in a Storage, which may be closed to this page. */
class Drawer {
  constructor(open, name) {
    this.name = name;
    try {
      this.storage = open();
      this.values = JSON.parse(this.storage.getItem(name) ?? "{}");
    } catch {
      this.values = {};
    }
  }

  get(key, fallback) {
    return this.values[key] ?? fallback;
  }

  set(key, value) {
    if (value === undefined || value === "") delete this.values[key];
    else this.values[key] = value;
    try {
      this.storage?.setItem(this.name, JSON.stringify(this.values));
    } catch {
      // Full or forbidden: it lasts as long as the page.
    }
  }
}

/** theme, language, sidebar, last (conversation), model, sampling */
export const preferences = new Drawer(() => localStorage, "glm.preferences");
/** key, and drafts by conversation */
export const session = new Drawer(() => sessionStorage, "glm.session");
