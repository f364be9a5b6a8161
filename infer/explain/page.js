"use strict";
// The page around the data: what is there with a configuration alone. All text is set as text.

const { walk, values } = JSON.parse(document.getElementById("data").textContent);
const state = {
  lang: new URLSearchParams(location.search).get("lang") || navigator.language,
  pass: "prefill", // or "decode"
  layer: null, // the open block
  token: null, // of the prompt, whose lengths are drawn
};
state.lang = state.lang.toLowerCase().startsWith("zh") ? "zh" : "en";

/** One of two texts, by language. */
const T = (en, zh) => (state.lang === "zh" ? zh : en);
const passOf = (name) => (name === "decode" ? walk.decode : walk.prefill);
const whole = (n) => n.toLocaleString("en-US");
const rounded = (n) => whole(Number(n.toPrecision(3)));
function percent(p) {
  if (p > 0 && p < 0.0005) return "< 0.05\u00a0%";
  if (p > 0.9995 && p < 1) return "> 99.9\u00a0%";
  return `${(100 * p).toFixed(p < 0.1 ? 2 : 1)}\u00a0%`;
}


/** 203346608128, "FLOP" -> "203 GFLOP"; 6243584000, "" -> "6.24B" (billions): three digits. */
function short(n, unit) {
  const steps = ["", unit ? "k" : "K", "M", unit ? "G" : "B", "T", "P"];
  let power = 0;
  while (n >= 999.5 && power < steps.length - 1) {
    n /= 1000;
    power += 1;
  }
  const digits = n >= 100 || (power === 0 && Number.isInteger(n)) ? 0 : n >= 10 ? 1 : 2;
  return `${n.toFixed(digits)}${unit ? "\u00a0" : ""}${steps[power]}${unit}`;
}

function seconds(s) {
  if (s >= 1) return `${s.toPrecision(3)} s`;
  return s >= 1e-3 ? `${(s * 1e3).toPrecision(3)} ms` : `${(s * 1e6).toPrecision(3)} µs`;
}

/** An element; children are elements or texts, attributes that are functions are listeners. */
function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

const shape = (numbers) => `[${numbers.join(", ")}]`;
/** What --model left out is called in the page's language. */
const modelName = () => (walk.model === "the bundled demo model" ? T("the bundled demo model", "自带的演示模型") : walk.model);

/** A stage's shape; gate and up also side by side. */
function shapes(stage) {
  const at = stage.axes.indexOf("C");
  if (at < 0) return shape(stage.shape);
  const joined = [...stage.shape.slice(0, at), 2 * stage.shape[at + 1]];
  return `${shape(stage.shape)} = ${shape(joined)}`;
}

/** 28672 -> "28 KiB", as the terminal has it. */
function binary(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  while (bytes >= 1024 && units.length > 1) {
    bytes /= 1024;
    units.shift();
  }
  return `${Number(bytes.toPrecision(4))} ${units[0]}`;
}

/** "BTCF" -> "B T 2 F". */
const axes = (letters) => [...letters].map((letter) => (letter === "C" ? "2" : letter)).join(" ");

/** Parameters, operations and bytes, those that are not 0. */
function cost(stage) {
  const parts = [];
  if (stage.params) parts.push(`${short(stage.params, "")}\u00a0${T("params", "参数")}`);
  if (stage.flops) parts.push(short(stage.flops, "FLOP"));
  if (stage.bytes) parts.push(short(stage.bytes, "B"));
  return parts.join("\u00a0· ");
}

const title = (stage) => T(stage.title_en, stage.title_zh);
const note = (stage) => T(stage.note_en, stage.note_zh);
const find = (name) => passOf(state.pass).stages.find((stage) => stage.name === name);

function topBar() {
  const choice = (name, options) =>
    el("span", { class: "switch", role: "group" }, options.map(([value, text, label]) =>
      el("button", {
        type: "button", "data-set": `${name}-${value}`, "aria-pressed": String(state[name] === value), "aria-label": label || null,
        click: () => { state[name] = value; render(); },
      }, text)));
  const passes = [
    ["prefill", T(`prompt: ${whole(walk.prefill.tokens)} ids`, `读提示：${whole(walk.prefill.tokens)} 个 id`)],
    ["decode", T("one step: 1 id", "一步：1 个 id")],
  ];
  return el("div", { class: "bar" }, el("div", {},
    el("b", {}, modelName()),
    choice("pass", passes),
    choice("lang", [["en", "EN", "English"], ["zh", "中文"]])));
}

function intro() {
  const counted = {
    published: T(", counted with the published tokenizer", "（按公开的分词器）"), asked: T(", as asked for", "（按要求）"), example: T(", an example", "（示例）"), tokenizer: "",
  }[walk.length_from];
  const pass = passOf(state.pass);
  const s = walk.sizes;
  const card = (label, number, more) => el("div", { class: "card" },
    el("span", { class: "muted" }, label), el("strong", {}, number), el("span", { class: "muted" }, more));
  const perPass = state.pass === "prefill" ? T("reading the prompt", "读提示") : T("one step", "一步");
  return el("section", {},
    el("h1", {}, T("How the prompt becomes an answer", "提示怎样变成回答")),
    el("p", { class: "muted" }, T(
      `${modelName()}: ${s.L} layers of ${s.D}, ${s.N} query heads on ${s.K} key/value heads of ${s.H}, feed-forward ${s.F}, vocabulary ${whole(s.V)}. Everything here comes from the program that answers.`,
      `${modelName()}：${s.L} 层，宽 ${s.D}；${s.N} 个查询头，${s.K} 个键值头，每头 ${s.H} 维；前馈 ${s.F}；词表 ${whole(s.V)}。这里的一切都来自真正用来回答的程序。`)),
    values && el("div", { class: "talk" },
      el("div", { class: "question" }, walk.prompt), el("div", { class: "answer", id: "answer-text" }, values.answer)),
    el("div", { class: "cards" },
      card(T("parameters", "参数"), short(walk.params, ""), whole(walk.params)),
      card(T("weights", "权重"), short(walk.weight_bytes, "B"),
        walk.weights_in + (values && values.dtype !== walk.weights_in ? T(`; values below: ${values.dtype}`, `；下方数值用 ${values.dtype}`) : "")),
      card(T("prompt", "提示"), `${whole(walk.length)} id${walk.length === 1 || state.lang === "zh" ? "" : "s"}`,
        (s.B > 1 ? T(`${s.B} rows of them`, `共 ${s.B} 行`) : T("one row", "一行")) + counted),
      card(T("operations", "运算"), short(pass.flops, "FLOP"), perPass),
      card(T("bytes moved", "读写的字节"), short(pass.bytes, "B"), perPass),
      card(T("intensity", "运算强度"), rounded(pass.intensity), T("FLOP a byte", "FLOP / 字节"))));
}

function pipeline() {
  const { B, L } = walk.sizes;
  const pass = passOf(state.pass);
  const node = (kind, name, ...inside) => el("div", { class: `node ${kind}`, "data-stage": name }, inside);
  const stageNode = (kind, name) => {
    const stage = find(name);
    return node(kind, name, el("h3", {}, title(stage)), el("span", { class: "shape" }, shape(stage.shape)), el("span", { class: "cost" }, cost(stage)),
      name === "embed" ? el("p", { class: "note" }, note(stage)) : null);
  };
  const layerParts = pass.stages.filter((stage) => stage.part === "attention" || stage.part === "mlp");
  const all = { params: 0, flops: 0, bytes: 0 };
  for (const stage of layerParts) for (const key in all) all[key] += L * stage[key];
  const strip = el("div", { class: "strip" }, Array.from({ length: L }, (_, layer) =>
    el("button", {
      type: "button", "data-layer": layer, "aria-expanded": String(state.layer === layer),
      "aria-label": T(`layer ${layer}`, `第 ${layer} 层`),
      click: () => { location.hash = state.layer === layer ? "pipeline" : `layer-${layer}`; },
    }, String(layer))));
  const first = state.pass === "prefill";
  const given = walk.prompt === null ? "" : T("the frame and special ids included", "含固定格式和特殊 id");
  return el("section", { id: "pipeline" },
    el("h2", {}, T("The pipeline", "流程")),
    el("p", { class: "muted" }, T(
      "Shapes are those of the switch above: the whole prompt at once, or one id of the answer. Open a block to look inside.",
      "形状随上方的开关而变：一次读完整个提示，或回答中的一个 id。点开一个块可看内部。")),
    letters(pass),
    el("div", { class: "pipeline" },
      node("io", "prompt", el("h3", {}, T("prompt", "提示")),
        el("span", { class: "said" }, walk.prompt === null ? T("(only its length was given)", "（只给了长度）") : walk.prompt)),
      node("io", "ids", el("h3", {}, T("ids", "id")), el("span", { class: "shape" }, shape([B, pass.tokens])),
        el("span", { class: "cost" }, first ? given : T("the one drawn last", "刚抽出的那一个"))),
      stageNode("io", "embed"),
      node("blocks", "blocks", el("h3", {}, T(`${L} blocks`, `${L} 个块`)), strip,
        el("span", { class: "shape" }, shape(find("mlp.add").shape)), el("span", { class: "cost" }, cost(all))),
      stageNode("io", "norm"),
      stageNode("head", "head"),
      node("io", "sampling", el("h3", {}, T("one id is drawn", "抽出一个 id")), el("span", { class: "shape" }, shape([B])),
        el("span", { class: "cost" }, values ? T("here: the likeliest", "此处取最可能的") : T("from the last position's logits", "按最后一个位置的 logits"))),
      el("div", { class: "loop" }, T("the id goes back in, alone; keys and values stay in the cache; until the end id", "这个词元单独再送入；键和值留在缓存里；直到结束符"))));
}

/** What the letters of shapes stand for. */
function letters(pass) {
  const s = walk.sizes;
  const meanings = [
    ["B", s.B, T("prompts together", "同时处理的提示数")], ["T", pass.tokens, T("ids of each", "每个提示的 id 数")],
    ["S", pass.keys, T("keys that are there", "已有的键数")], ["D", s.D, T("width of the stream", "残差流宽度")],
    ["N", s.N, T("query heads", "查询头数")], ["K", s.K, T("key/value heads", "键值头数")], ["H", s.H, T("width of a head", "每头宽度")],
    ["F", s.F, T("feed-forward width", "前馈宽度")], ["V", s.V, T("vocabulary", "词表大小")],
  ];
  return el("p", { class: "letters muted" }, meanings.map(([letter, size, meaning]) =>
    el("span", {}, el("b", { class: "mono" }, letter), ` = ${whole(size)} ${meaning}`)));
}

// Each line of a block's drawing, in lanes: a stage in as many as it takes, "|" passes by. Then, how
// many arrows leave it, where it is not one.
// The lanes of attention are those of queries, keys and values.
const ROWS = {
  attention: [["norm", 3, 3], ["q", 1], ["k", 1], ["v", 1], ["rope_q", 1], ["rope_k", 1], ["|", 1], ["|", 1], ["cache", 2, 2],
    ["scores", 2], ["|", 1], ["softmax", 2], ["|", 1], ["values", 3], ["o", 3], ["add", 3]],
  mlp: [["norm", 3], ["gate_up", 3], ["act", 3], ["down", 3], ["add", 3]],
};
/** What goes into a stage that does not read the one above it alone. */
const inputs = (name) => ({
  "attention.k": T("from: RMSNorm", "来自：RMSNorm"), "attention.v": T("from: RMSNorm", "来自：RMSNorm"),
  "attention.rope_q": T("from: queries", "来自：查询 Q"), "attention.rope_k": T("from: keys", "来自：键 K"),
  "attention.cache": T("from: rotated keys, values", "来自：旋转后的 K、值 V"),
  "attention.scores": T("from: rotated queries, cached keys", "来自：旋转后的 Q、缓存的 K"),
  "attention.values": T("from: softmax, cached values", "来自：softmax、缓存的 V"),
})[name];

function part(name, heading) {
  const stages = passOf(state.pass).stages.filter((stage) => stage.part === name);
  const total = { params: 0, flops: 0, bytes: 0 };
  for (const stage of stages) for (const key in total) total[key] += stage[key];
  const box = (stage) => el("div", { class: `stage${stage.params || stage.flops || stage.bytes ? "" : " plain"}`, "data-stage": stage.name },
    el("div", { class: "title" }, title(stage)),
    inputs(stage.name) ? el("div", { class: "from muted" }, inputs(stage.name)) : null,
    el("span", { class: "shape" }, shapes(stage), " ", el("span", { class: "axes" }, axes(stage.axes))),
    el("div", { class: "cost" }, cost(stage)),
    note(stage) ? el("p", { class: "note" }, note(stage)) : null);
  return el("div", { class: `part ${name}` },
    el("h3", {}, heading), el("div", { class: "total" }, T("all of it: ", "合计：") + cost(total)),
    el("div", { class: "skip", title: T("the stream passes by", "残差流从旁边经过") }),
    el("div", { class: "lanes" }, ROWS[name].map(([stage, lanes, arrows]) =>
      el("div", { class: `lane${lanes}${stage === "|" ? " pass" : ""}` }, stage === "|" ? null : box(find(`${name}.${stage}`)),
        stage === "add" ? null : el("div", { class: "arrows", "aria-hidden": "true" }, Array.from({ length: arrows || 1 }, () => el("span", {}, "↓")))))));
}

function block() {
  const { L } = walk.sizes;
  const open = state.layer;
  const go = (layer) => () => { location.hash = layer === null ? "pipeline" : `layer-${layer}`; };
  return el("section", { id: `layer-${open}`, class: "panel", "data-block": open },
    el("div", { class: "tools" },
      el("h2", {}, T(`Layer ${open}`, `第 ${open} 层`), el("span", { class: "muted" }, T(` (0 – ${L - 1})`, `（0 – ${L - 1}）`))),
      el("button", { type: "button", disabled: open === 0 ? "" : null, click: go(open - 1) }, T("← previous", "← 上一层")),
      el("button", { type: "button", disabled: open === L - 1 ? "" : null, click: go(open + 1) }, T("next →", "下一层 →")),
      el("button", { type: "button", "data-close": "", click: go(null) }, T("close", "关闭"))),
    el("p", { class: "muted" }, T(
      "All layers have these shapes; only their weights differ. The line at the left is the stream, to which each half adds.",
      "每一层的形状都相同，只有权重不同。左边的线是残差流，每一半都把结果加上去。")),
    el("div", { class: "block" },
      part("attention", T("Attention", "注意力")),
      el("div", {}, part("mlp", T("Feed-forward (mlp)", "前馈（mlp）")), values ? layerValues(open) : null)));
}

const GROUPS = [
  ["--io", "embedding", "词嵌入", (name) => name === "embed"],
  ["--attention", "attention: q, k, v, output", "注意力：q、k、v、输出投影", (name) => /^attention\.([qkvo]|norm)$/.test(name)],
  ["--scores", "attention: scores, values, cache", "注意力：分数、加权、缓存", (name) => /^attention\.(scores|values|cache)$/.test(name)],
  ["--mlp", "feed-forward", "前馈", (name) => name.startsWith("mlp.")],
  ["--head", "norm and head", "归一化与输出层", (name) => name === "head" || name === "norm"],
];

function painted(color, share) {
  const piece = el("i", {});
  piece.style.background = `var(${color})`;
  if (share !== undefined) piece.style.width = `${100 * share}%`;
  return piece;
}

const barLine = (label, stack, size) =>
  el("div", { class: "line" }, el("span", {}, label), stack, el("span", { class: "num mono" }, size));

function costs() {
  const pass = passOf(state.pass);
  const sums = (key) => GROUPS.map(([, , , has]) => pass.stages.filter((stage) => has(stage.name))
    .reduce((sum, stage) => sum + stage[key] * (/^(attention|mlp)$/.test(stage.part) ? walk.sizes.L : 1), 0));
  const line = (label, key, unit) => {
    const parts = sums(key);
    const total = parts.reduce((a, b) => a + b, 0);
    const stack = el("div", { class: "stack" }, parts.map((n, index) => {
      const piece = painted(GROUPS[index][0], n / total);
      piece.title = `${T(GROUPS[index][1], GROUPS[index][2])}: ${short(n, unit)} (${percent(n / total)})`;
      return n ? piece : null;
    }));
    return barLine(label, stack, short(total, unit));
  };
  return el("section", { id: "costs" },
    el("h2", {}, T("Where it goes", "花在哪里")),
    el("p", { class: "muted" }, T(
      "FLOP: 2 for each product and sum of a matrix product, also of scores of tokens that may not be seen. Bytes: weights read, keys and values written and read. When the prompt is read, the head is counted for every position; to answer, the last one is enough.",
      "FLOP：矩阵乘法中每次乘加算 2，看不到的词元的分数（被遮蔽）也计入。字节：读的权重、读写的键和值。读提示时输出层按全部位置计算；回答只需最后一个位置。")),
    el("div", { class: "panel" }, el("div", { class: "bars" },
      line(T("parameters", "参数"), "params", ""), line("FLOP", "flops", "FLOP"), line(T("bytes", "字节"), "bytes", "B")),
    el("div", { class: "legend" }, GROUPS.map(([color, en, zh]) => el("span", {}, painted(color), T(en, zh))))));
}

function cache() {
  const { cache } = walk;
  const bar = (bytes, color) => el("div", { class: "stack" }, painted(color, bytes / cache.with_full_heads));
  return el("section", { id: "cache" },
    el("h2", {}, T("What the cache takes", "缓存占多少")),
    el("div", { class: "panel" },
      el("div", { class: "bars" },
        barLine(T(`a token, ${walk.sizes.K} key/value heads`, `每词元，${walk.sizes.K} 个键值头`), bar(cache.per_token, "--attention"), binary(cache.per_token)),
        barLine(T(`the same with ${walk.sizes.N}`, `若有 ${walk.sizes.N} 个`), bar(cache.with_full_heads, "--scores"), binary(cache.with_full_heads))),
      el("p", { class: "muted" }, T(
        `After this prompt ${binary(cache.now)}, at ${whole(walk.context)} tokens ${binary(cache.at_most)}: 1/${cache.with_full_heads / cache.per_token} of what full heads would take.`,
        `读完这个提示 ${binary(cache.now)}；${whole(walk.context)} 个词元时 ${binary(cache.at_most)}：是完整键值头的 1/${cache.with_full_heads / cache.per_token}。`))));
}

function devices() {
  if (!walk.bounds.length) return null;
  const limit = (name) => ({ bandwidth: T("bandwidth", "带宽"), arithmetic: T("arithmetic", "算力"), unknown: "?" })[name];
  const unknown = walk.bounds.some((bound) => bound.flops === null);
  return el("section", { id: "devices" },
    el("h2", {}, T("The least time on a device", "各设备至少要多久")),
    el("p", { class: "muted" }, T(
      "Bounds from the makers' figures, which no program reaches. Nothing here was measured. The head reads one position of each prompt, and scores of tokens that may not be seen are left out.",
      "由厂商标称值算出的下限，任何程序都达不到。没有实测。输出层只算每个提示的一个位置，看不到的词元的分数不计。"),
    unknown ? T(" ?: no figure for arithmetic is known; the times are those of the bytes alone.", " ?：算力数据未知，时间只按字节计。") : null),
    el("div", { class: "panel" }, el("table", {},
      el("tr", {}, [T("device", "设备"), T("memory", "内存"), T("bandwidth", "带宽"), T("fits", "放得下"), T("prompt", "读提示"), T("a step", "一步"), T("limit (prompt / step)", "受限于（读提示 / 一步）"), "tokens/s"]
        .map((text, index) => el("th", { class: [1, 2, 4, 5, 7].includes(index) ? "num" : null }, text))),
      walk.bounds.map((bound) => el("tr", {},
        el("td", {}, bound.device), el("td", { class: "num" }, short(bound.memory, "B")), el("td", { class: "num" }, `${short(bound.bandwidth, "B")}/s`),
        el("td", {}, bound.fits ? "✓" : T("no", "否")), el("td", { class: "num" }, seconds(bound.prefill)), el("td", { class: "num" }, seconds(bound.decode)),
        el("td", {}, [...new Set([bound.prefill_limit, bound.decode_limit])].map(limit).join(" / ")), el("td", { class: "num" }, rounded(bound.tokens_per_s)))))));
}

function everything() {
  const pass = passOf(state.pass);
  return el("details", { id: "stages" }, el("summary", {}, T(`All ${pass.stages.length} stages in numbers`, `全部 ${pass.stages.length} 个阶段的数字`)),
    el("div", { class: "panel" }, el("table", {},
      el("tr", {}, [T("stage", "阶段"), "", T("shape", "形状"), T("published code", "官方代码"), T("parameters", "参数"), "FLOP", T("bytes", "字节")]
        .map((text, index) => el("th", { class: index > 3 ? "num" : null }, text))),
      pass.stages.map((stage) => el("tr", { "data-row": stage.name },
        el("td", {}, title(stage), /^(attention|mlp)$/.test(stage.part) ? el("small", { class: "muted" }, ` x ${walk.sizes.L}`) : null),
        el("td", { class: "mono" }, axes(stage.axes)), el("td", { class: "mono" }, shapes(stage)), el("td", { class: "mono muted" }, shape(stage.reference)),
        [stage.params, stage.flops, stage.bytes].map((n) => el("td", { class: "num mono" }, n ? whole(n) : "")))))));
}

/** What the fragment asks for: an open block, or a place to scroll to. */
function readHash() {
  const asked = /^#layer-(\d+)$/.exec(location.hash);
  state.layer = asked && Number(asked[1]) < walk.sizes.L ? Number(asked[1]) : null;
}

function render() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.title = `${walk.prompt || modelName()} · infer.explain`;
  const page = document.getElementById("page");
  page.replaceChildren(topBar(), el("main", {},
    intro(), pipeline(), state.layer === null ? null : block(), costs(), everything(), cache(), devices(), ...realValues()));
  drawMaps();
}

function start() {
  readHash();
  render();
  addEventListener("hashchange", () => {
    readHash();
    render();
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  });
  addEventListener("resize", fit);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.documentElement.dataset.ready = "yes";
}

addEventListener("error", (event) => {
  document.documentElement.dataset.failed = event.message;
  document.body.prepend(el("div", { class: "failed" }, event.message));
});
