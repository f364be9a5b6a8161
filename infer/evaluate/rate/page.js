"use strict";
// The page of a rating sheet. All text is set as text. Progress is kept in this browser.

const { sheet, scale, criteria, items } = JSON.parse(document.getElementById("data").textContent);
const STORE = `glm2-jax ratings ${sheet}`;
const state = { rater: "", ratings: {}, at: 0, lang: "", kept: true, saved: "", ...stored() };
state.lang = new URLSearchParams(location.search).get("lang") || state.lang || navigator.language;
state.lang = state.lang.toLowerCase().startsWith("zh") ? "zh" : "en";

/** One of two texts, by language. */
const T = (en, zh) => (state.lang === "zh" ? zh : en);
const ab = scale === "ab";
const complete = (item) => criteria.every((name) => (state.ratings[item.id] || {})[name] !== undefined);
const rated = () => items.filter(complete);

/** What this browser has kept of this sheet; nothing if it may not, or if it is damaged. */
function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE)) || {};
    const known = new Set(items.map((item) => item.id));
    const { rater, ratings, at, lang } = found;
    if (!Object.keys(ratings).every((id) => known.has(id))) return {};
    return { rater: String(rater), ratings, at: Number.isInteger(at) && items[at] ? at : 0, lang: String(lang) };
  } catch {
    return {};
  }
}

function keep() {
  const { rater, ratings, at, lang } = state;
  try {
    localStorage.setItem(STORE, JSON.stringify({ rater, ratings, at, lang }));
    state.kept = true;
  } catch {
    state.kept = false;
  }
}

/** An element; children are elements or texts, attributes that are functions are listeners. */
function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null));
  return made;
}

const WORDS = {
  readability: () => [T("Readability", "可读性"), T("clear structure, easy to take in", "条理清楚，容易看懂")],
  fluency: () => [T("Fluency", "流畅度"), T("natural and correct language", "语言自然、通顺、无语病")],
  accuracy: () => [T("Accuracy", "准确性"), T("what it says is true and answers the question", "内容属实，切合问题")],
  helpfulness: () => [T("Helpfulness", "有用性"), T("you would have been helped by it", "对提问的人有帮助")],
};

function topBar() {
  const language = (name, text) => el("button", {
    type: "button", lang: name, "aria-pressed": String(state.lang === name), "data-lang": name,
    click: () => change({ lang: name }, `[data-lang=${name}]`),
  }, text);
  const done = rated().length;
  return el("header", { class: "bar" }, el("div", {},
    el("span", { id: "progress" }, T(`${done} of ${items.length} rated`, `已评 ${done}/${items.length}`)),
    el("progress", { max: items.length, value: done, "aria-label": T("progress", "进度") }),
    el("span", { class: "lang", role: "group", "aria-label": T("language", "语言") }, language("zh", "中文"), language("en", "EN"))));
}

function intro() {
  return el("section", {},
    el("h1", {}, ab ? T("Which answer is better?", "哪个回答更好？") : T("How good are these answers?", "这些回答有多好？")),
    el("p", { class: "muted" }, ab
      ? T("You see a question and two answers, in random order. Choose for each line: A, B, or the same. Judge only what you see. ", "每题有一个问题和两个回答，顺序随机。请逐项选择：A 更好、B 更好或差不多。只根据所见内容判断。")
      : T("You see a question and an answer. Give 1 to 5 points in each line. Judge only what you see. ", "每题有一个问题和一个回答。请逐项打 1 到 5 分。只根据所见内容判断。"),
      T("Your progress stays in this browser; nothing is sent.", "进度保存在本浏览器中，不会发送任何内容。")),
    state.kept ? null : el("p", { class: "warn", role: "alert" }, T("This browser does not keep the progress: save the ratings before you close the page.", "此浏览器无法保存进度：关闭页面前请先保存评分。")));
}

/** A line of buttons for one criterion of an item. */
function criterion(item, name) {
  const [title, meaning] = WORDS[name]();
  const marks = ab
    ? [["A", T("A is better", "A 更好")], ["tie", T("the same", "差不多")], ["B", T("B is better", "B 更好")]]
    : [1, 2, 3, 4, 5].map((mark) => [mark, String(mark)]);
  const chosen = (state.ratings[item.id] || {})[name];
  const button = ([mark, text]) => el("button", {
    type: "button", "aria-pressed": String(chosen === mark), "data-mark": `${name}-${mark}`,
    click: () => {
      state.ratings[item.id] = { ...state.ratings[item.id], [name]: mark };
      change({}, `[data-mark="${name}-${mark}"]`);
    },
  }, text);
  const ends = ab ? null : el("div", { class: "ends" }, el("span", {}, T("1 = very poor", "1 = 很差")), el("span", {}, T("5 = very good", "5 = 很好")));
  return el("div", { class: "criterion" },
    el("div", {}, el("b", {}, title), el("span", { class: "muted" }, meaning)),
    el("div", { class: "marks", role: "group", "aria-label": title }, marks.map(button)), ends);
}

function question(item) {
  const texts = (title, text, kind) => el("section", { class: `panel ${kind}` }, el("h2", {}, title), el("div", { class: "text" }, text));
  const names = ab ? [T("Answer A", "回答 A"), T("Answer B", "回答 B")] : [T("Answer", "回答")];
  const last = state.at === items.length - 1;
  const step = (by, name, text, main) => el("button", {
    type: "button", id: name, class: main ? "main" : null, disabled: items[state.at + by] ? null : "",
    click: () => go(state.at + by),
  }, text);
  return [
    texts(T(`Question ${state.at + 1} of ${items.length}`, `问题 ${state.at + 1}/${items.length}`), item.prompt, "prompt"),
    el("div", { class: "answers" }, item.answers.map((text, at) => texts(names[at], text || T("(empty)", "（空）"), "answer"))),
    el("section", { class: "panel" }, criteria.map((name) => criterion(item, name))),
    el("nav", { class: "steps", "aria-label": T("questions", "题目") },
      step(-1, "back", T("Back", "上一题"), false),
      step(1, "next", T("Next", "下一题"), complete(item) && !last)),
  ];
}

function jump() {
  const to = (item, at) => el("button", {
    type: "button", class: complete(item) ? "done" : null, "aria-current": at === state.at ? "true" : null,
    "aria-label": T(`question ${at + 1}${complete(item) ? ", rated" : ""}`, `第 ${at + 1} 题${complete(item) ? "，已评" : ""}`),
    click: () => go(at),
  }, String(at + 1));
  return el("section", { class: "panel" }, el("h2", {}, T("All questions", "全部题目")), el("div", { class: "jump" }, items.map(to)));
}

function save() {
  const done = rated().length;
  const input = el("input", {
    id: "rater", value: state.rater, maxlength: "60", autocomplete: "off",
    input: (event) => {
      state.rater = event.target.value;
      keep();
      button.disabled = !state.rater.trim() || !done;
    },
  });
  const button = el("button", { type: "button", id: "save", class: "main", disabled: state.rater.trim() && done ? null : "", click: download },
    T("Save the ratings as a file", "保存评分文件"));
  const told = state.saved
    ? el("p", { class: "state good", role: "status" }, T(`Saved as ${state.saved}. Please send this file to the person who gave you the sheet.`, `已保存为 ${state.saved}，请把该文件发给提供评分表的人。`))
    : el("p", { class: "state muted" }, done === items.length
      ? T("All questions are rated. Thank you!", "全部题目已评完，谢谢！")
      : T(`${items.length - done} questions are left. You can save at any time and continue later.`, `还剩 ${items.length - done} 题。可以随时保存，稍后继续。`));
  return el("section", { class: "panel save" }, el("label", {}, T("Your name", "您的姓名"), input), button, told);
}

/** Give the browser a file of all items that are rated completely. */
function download() {
  const ratings = Object.fromEntries(rated().map((item) => [item.id, state.ratings[item.id]]));
  const rater = state.rater.trim();
  const content = { format: "glm2-jax ratings 1", sheet, rater, kind: "person", ratings };
  const name = `ratings-${rater.replace(/[^\p{L}\p{N}_-]+/gu, "-")}-${sheet.slice(0, 6)}.json`;
  const address = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  change({ saved: name }, "#save");
}

function go(at) {
  change({ at }, null);
  scrollTo(0, 0);
}

/** Change the state, keep it, draw again, and focus an element of the new page. */
function change(values, focus) {
  Object.assign(state, { saved: "" }, values);
  keep();
  draw();
  if (focus) document.querySelector(focus).focus({ preventScroll: true });
}

function draw() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.title = T("Rating sheet", "评分表");
  document.getElementById("page").replaceChildren(
    topBar(), el("main", {}, state.at === 0 ? intro() : null, question(items[state.at]), jump(), save()));
  const box = document.querySelector(".jump");
  box.scrollTop = box.querySelector("[aria-current]").offsetTop - box.clientHeight / 2;
  document.documentElement.dataset.ready = "yes";
}

keep();
draw();
