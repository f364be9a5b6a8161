// What needs weights: tokens, attention, the logit lens, the answer.

const labelOf = (token) => token.piece.replaceAll("<0x0A>", "⏎").replaceAll("▁", "␣");
const quoted = (token) => T(`“${labelOf(token)}”`, `「${labelOf(token)}」`);

/** Sections after the shapes; without weights, how to get them. */
function realValues() {
  if (values === null) {
    return [el("section", { id: "values" }, el("h2", {}, T("Real values", "实际数值")),
      el("p", { class: "muted" }, T(
        "This page was made from the configuration alone. With a checkpoint (--model DIR) it also shows attention, the predicted next tokens after each layer, and the answer token by token.",
        "本页仅由配置生成。用 --model DIR 指定模型目录后，还会显示注意力、逐层预测的下一个 token，以及回答的逐 token 生成过程。")))];
  }
  return [promptTokens(), attention(), lens(), lengths(), answer()];
}

function promptTokens() {
  return el("section", { id: "tokens" },
    el("h2", {}, T("The prompt as it is built", "实际输入模型的提示词")),
    el("p", { class: "muted" }, T(
      `The question in its template, and its ${whole(values.tokens.length)} ids. ⏎ is a newline, ␣ a space, <0xF0> one byte of a character that has no piece; ids with a dashed border are special: no text is encoded as one${walk.family === "glm" ? ", except the masks of blanks" : ""}.`,
      `套用模板后的问题，以及编码得到的 ${whole(values.tokens.length)} 个 id。⏎ 表示换行，␣ 表示空格，<0xF0> 表示词表外字符的一个字节；虚线框为特殊 token，${walk.family === "glm" ? "除 [MASK] 等填空标记外，" : ""}普通文本不会编码成它们。`)),
    el("div", { class: "panel" }, el("pre", {}, values.text),
      el("div", { class: "chips" }, values.tokens.map((token, index) => el("span", { class: token.text ? "chip" : "chip special", title: token.piece }, labelOf(token), el("small", {}, String(token.id)),
        values.positions[index].length > 1 ? el("small", {}, `(${values.positions[index].join(", ")})`) : null))),
      values.positions[0].length > 1 ? el("p", { class: "muted" }, T("In brackets: the position and the block position of each.", "括号内：每个 token 的位置和块位置。")) : null));
}

function map(head) {
  const from = (t, s) => head.weights[t][s];
  const readout = el("div", { class: "readout", "aria-live": "polite" }, T("point at a cell", "指向或点按格子查看"));
  const canvas = el("canvas", { class: "map", tabindex: "0", role: "img", "aria-label": T(`attention of layer ${head.layer}, head ${head.head}`, `第 ${head.layer} 层第 ${head.head} 头的注意力`) });
  const group = Math.floor(head.head / (walk.sizes.N / walk.sizes.K));
  canvas.head = head;
  canvas.at = null;
  const show = (t, s) => {
    if (t < 0 || s < 0 || t >= head.weights.length || s > values.sees[t]) return;
    canvas.at = [t, s];
    readout.textContent = T(`${percent(from(t, s))} of the attention of ${quoted(values.tokens[t])} goes to ${quoted(values.tokens[s])}`, `${quoted(values.tokens[t])} 对 ${quoted(values.tokens[s])} 的注意力为 ${percent(from(t, s))}`);
    drawMap(canvas);
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const { left, top, cell } = canvas.layout;
    show(Math.floor((event.clientY - box.top - top) / cell), Math.floor((event.clientX - box.left - left) / cell));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [t, s] = canvas.at || [0, 0];
    show(t + step[0], Math.min(s + step[1], values.sees[t + step[0]]));
  });
  return el("figure", {}, el("figcaption", {}, el("b", {}, T(`layer ${head.layer}, head ${head.head}`, `第 ${head.layer} 层，第 ${head.head} 头`)), T(` (key/value head ${group})`, `（键值头 ${group}）`)), canvas, readout);
}

const maps = (heads) => el("div", { class: values.tokens.length > 48 ? "maps large" : "maps" }, heads.map(map));

/** Draws one map at the size its place has; the darker, the more (by the square root). */
function drawMap(canvas) {
  const { weights } = canvas.head;
  const count = weights.length;
  const style = getComputedStyle(document.documentElement);
  const width = canvas.clientWidth;
  const context = canvas.getContext("2d");
  const font = (size) => `${size}px system-ui, "PingFang SC", "Noto Sans CJK SC", "WenQuanYi Micro Hei", sans-serif`;
  context.font = font(11);
  const labels = values.tokens.map((token) => [...labelOf(token)].slice(0, 9).join(""));
  const room = Math.min(Math.max(...labels.map((label) => context.measureText(label).width)), 70) + 8;
  const cell = Math.max(1, Math.min(26, 720 / count, (width - room - 2) / count));
  const size = Math.min(12, cell - 1);
  const named = size >= 7;
  const left = named ? room : 0;
  const top = named ? room * 0.9 : 0;
  const height = Math.ceil(top + cell * count + 2);
  const sharp = window.devicePixelRatio || 1;
  canvas.layout = { left, top, cell };
  canvas.width = Math.round(width * sharp);
  canvas.height = Math.round(height * sharp);
  canvas.style.height = `${height}px`;
  context.scale(sharp, sharp);
  const heat = style.getPropertyValue("--heat").trim();
  context.fillStyle = style.getPropertyValue("--soft");
  context.beginPath();
  for (let t = 0; t < count; t += 1) context.rect(left, top + t * cell, (values.sees[t] + 1) * cell, cell);
  context.fill();
  for (let t = 0; t < count; t += 1) {
    for (let s = 0; s <= values.sees[t]; s += 1) {
      context.fillStyle = `rgb(${heat} / ${Math.sqrt(weights[t][s])})`;
      context.fillRect(left + s * cell, top + t * cell, cell - (cell > 6 ? 1 : 0), cell - (cell > 6 ? 1 : 0));
    }
  }
  if (named) {
    context.font = font(size);
    context.textBaseline = "middle";
    for (let t = 0; t < count; t += 1) {
      const strong = canvas.at && (canvas.at[0] === t || canvas.at[1] === t);
      context.fillStyle = style.getPropertyValue(strong ? "--ink" : "--muted");
      context.textAlign = "right";
      context.fillText(labels[t], left - 5, top + (t + 0.5) * cell, room - 8);
      context.save();
      context.translate(left + (t + 0.5) * cell, top - 5);
      context.rotate(-Math.PI / 3);
      context.textAlign = "left";
      context.fillText(labels[t], 0, 0, room - 8);
      context.restore();
    }
  }
  if (canvas.at) {
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = 1.5;
    context.strokeRect(left + canvas.at[1] * cell, top + canvas.at[0] * cell, cell - 1, cell - 1);
  }
}

function drawMaps() {
  for (const canvas of document.querySelectorAll("canvas.map")) drawMap(canvas);
}

function attention() {
  if (!values.heads.length) return null;
  return el("section", { id: "attention" },
    el("h2", {}, T("Attention maps", "注意力热图")),
    el("p", { class: "muted" }, T(
      "Each row is a token, each column a token it attends to; a row sums to 100 %, and tokens that it does not see are masked. Darker is more (by the square root). Other heads: --heads LAYER:HEAD.",
      "每行是一个 token，每列是它关注的 token；每行之和为 100 %，看不到的 token 被掩码屏蔽。颜色越深，权重越大（按平方根）。查看其他头：--heads 层:头。")),
    el("div", { class: "panel" }, maps(values.heads)));
}

/** What one layer did, for its open block. */
function layerValues(index) {
  const layer = values.layers.find((one) => one.layer === index);
  const heads = values.heads.filter((head) => head.layer === index);
  const last = layer.stream.length - 1;
  return el("div", { "data-values": index },
    el("p", {}, T("At the last token, the norm of this layer's output is ", "在最后一个 token 处，本层输出的范数为 "), el("b", {}, layer.stream[last].toPrecision(4)),
      T("; attention added ", "；其中注意力的增量为 "), el("b", {}, layer.attention[last].toPrecision(4)), T(", the feed-forward part ", "，前馈网络的增量为 "), el("b", {}, layer.mlp[last].toPrecision(4)),
      T(". With norm and head applied here, the next token would be ", "。若在此处直接接上归一化和输出层，预测的下一个 token 是 "), guess(layer.lens[0], true), T(".", "。")),
    heads.length ? maps(heads) : null);
}

/** A candidate, tinted by its probability. */
function guess(candidate, best) {
  const box = el("span", { class: best ? "guess best" : "guess", title: `${candidate.token.piece} (${candidate.token.id})` }, el("span", { class: "piece" }, labelOf(candidate.token)), " ", el("small", {}, percent(candidate.probability)));
  box.style.background = `rgb(${getComputedStyle(document.documentElement).getPropertyValue("--heat").trim()} / ${0.06 + 0.44 * candidate.probability})`;
  return box;
}

function lens() {
  const final = values.layers[values.layers.length - 1].lens[0].token.id;
  const name = (layer) => (layer.layer < 0 ? T("embedding", "词嵌入") : T(`layer ${layer.layer}`, `第 ${layer.layer} 层`));
  return el("section", { id: "lens" },
    el("h2", {}, T("Logit lens: the next token, layer by layer", "Logit lens：逐层预测的下一个 token")),
    el("p", { class: "muted" }, T(
      "What norm and head would predict after each layer, at the end of the prompt. The last row is the model's own prediction; its first choice is framed wherever it appears.",
      "在提示词末尾，把每一层的输出直接接到归一化和输出层，得到的预测。最后一行是模型的实际预测，其首选 token 在各层中出现时加框标出。")),
    el("div", { class: "panel" }, el("table", { class: "lens" }, values.layers.map((layer) =>
      el("tr", { "data-lens": layer.layer }, el("td", { class: "muted" }, name(layer)), layer.lens.map((one) => el("td", {}, guess(one, one.token.id === final))))))));
}

function lengths() {
  const chosen = state.token ?? values.tokens.length - 1;
  const [W, H, left, bottom] = [Math.max(300, Math.min(innerWidth, 1240) - 90), 220, 48, 26];
  const count = values.layers.length;
  const series = [["--io", T("residual stream", "残差流"), "stream"], ["--attention", T("added by attention", "注意力的增量"), "attention"], ["--mlp", T("added by feed-forward", "前馈网络的增量"), "mlp"]];
  const most = Math.max(...series.flatMap(([, , key]) => values.layers.map((layer) => layer[key][chosen])), 1e-9);
  const x = (index) => left + ((W - left - 12) * index) / Math.max(count - 1, 1);
  const y = (value) => H - bottom - ((H - bottom - 14) * value) / most;
  const lines = series.map(([color, name, key]) => {
    const points = values.layers.map((layer, index) => `${x(index).toFixed(1)} ${y(layer[key][chosen]).toFixed(1)}`);
    const path = el("path", { d: `M${points.join("L")}`, fill: "none", "stroke-width": 2 });
    path.style.stroke = `var(${color})`;
    const dots = values.layers.map((layer, index) => {
      const dot = el("circle", { cx: x(index), cy: y(layer[key][chosen]), r: count > 40 ? 2 : 3 }, el("title", {}, `${name}: ${layer[key][chosen].toPrecision(4)}`));
      dot.style.fill = `var(${color})`;
      return dot;
    });
    return el("g", {}, path, dots);
  });
  const every = Math.ceil((count * 42) / W);
  const marks = values.layers.filter((layer, index) => index % every === 0).map((layer) =>
    el("text", { x: x(layer.layer + 1), y: H - 8, "text-anchor": "middle" }, layer.layer < 0 ? T("embed", "嵌入") : String(layer.layer)));
  const grid = [0, 0.5, 1].map((share) => {
    const rule = el("line", { x1: left, x2: W - 12, y1: y(most * share), y2: y(most * share) });
    rule.style.stroke = "var(--line)";
    return el("g", {}, rule, el("text", { x: left - 6, y: y(most * share) + 4, "text-anchor": "end" }, (most * share).toPrecision(3)));
  });
  return el("section", { id: "lengths" },
    el("h2", {}, T("Norm of the residual stream", "残差流的范数")),
    el("p", { class: "muted" }, T("Euclidean norms after each layer, for the token selected below.", "每一层之后的 L2 范数；点击下方的 token 切换。")),
    el("div", { class: "panel" },
      el("div", { class: "chips" }, values.tokens.map((token, index) => el("button", {
        type: "button", class: "chip", "aria-pressed": String(index === chosen), click: () => { state.token = index; document.getElementById("lengths").replaceWith(lengths()); },
      }, labelOf(token)))),
      el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": T("norms by layer", "逐层的范数") }, grid, marks, lines),
      el("div", { class: "legend" }, series.map(([color, name]) => el("span", {}, painted(color), name)))));
}

function answer() {
  const ends = { stop: T("The last one is the end token.", "最后一个是结束符。"), length: T("It ends at the length limit.", "回答在长度上限处截断。") }[values.end] || values.end;
  return el("section", { id: "answer" },
    el("h2", {}, T("The answer, token by token", "回答的逐 token 生成过程")),
    el("p", { class: "muted" }, T(
      `The most probable token is always taken here; chat samples. Probabilities are before temperature, top-k and top-p. ${ends}`,
      `此处始终取概率最高的 token；实际对话时按概率采样。概率未经 temperature、top-k、top-p 调整。${ends}`)),
    el("div", { class: "panel" }, el("table", { class: "lens" },
      el("tr", {}, ["", "token", T("probability", "概率"), T("alternatives", "其他候选")].map((text) => el("th", {}, text))),
      values.steps.map((step, index) => {
        const { token, probability } = step.chosen;
        return el("tr", { "data-step": index }, el("td", { class: "muted num" }, String(index + 1)),
          el("td", {}, el("b", {}, labelOf(token)), " ", el("small", {}, String(token.id))),
          el("td", {}, el("div", { class: "share" }, el("div", { class: "stack" }, painted("--io", probability)), el("small", {}, percent(probability)))),
          el("td", { class: "instead" }, step.alternatives.filter((one) => one.token.id !== token.id).map((one) => [guess(one, false), " "])));
      }))));
}

/** Where the residual carries the output of the norm, its line begins after the norm. */
function drawResiduals() {
  for (const line of walk.normed_residual ? document.querySelectorAll(".skip") : []) {
    const [part, norm] = [line.parentNode, line.parentNode.querySelector(".stage")].map((box) => box.getBoundingClientRect());
    line.style.top = `${norm.bottom - part.top + 8}px`;
  }
}

/** What depends on the size of the window. */
function fit() {
  drawResiduals();
  drawMaps();
  document.getElementById("lengths")?.replaceWith(lengths());
}

start();
