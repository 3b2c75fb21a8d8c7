// The page: asks for pictures, shows scales as they appear, and paints masks. No library; every text goes in as text.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { model: null, stop: null, token: sessionStorage.getItem("token") || "" };

// ------------------------------------------------------------------------------------------------ talking to the service

class Failure extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, body, signal) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, method: body ? "POST" : "GET", body: body ? JSON.stringify(body) : undefined };
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const text = await answer.text();
  let said = text;
  try { said = JSON.parse(text).error; } catch { /* not ours: shown as it is */ }
  if (answer.status === 401) { $("token-form").hidden = false; $("token").focus(); }
  throw new Failure(answer.status, said || `the service answered ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      const lines = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const name = lines.find((line) => line.startsWith("event: "));
      const data = lines.find((line) => line.startsWith("data: "));
      if (name && data) yield [name.slice(7), JSON.parse(data.slice(6))];
    }
  }
}

// -------------------------------------------------------------------------------------------------------- the controls

function number(id) {
  const text = $(id).value.trim();
  return text === "" ? null : Number(text);
}

function sampling() {
  const given = {
    seed: number("seed"), cfg: number("cfg"), mask_cfg: number("mask-cfg"), top_k: number("top-k"),
    top_p: number("top-p"), mask_schedule: $("mask-schedule").value.trim() || null,
  };
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== null));
}

function className(label) {
  const names = state.model.classes;
  const name = names && names[label].split(",")[0];
  return name && name !== String(label) ? name : `class ${label}`;
}

function fillClasses() {
  const labels = [...Array(state.model.num_classes).keys()];
  const shown = (label) => className(label) + (className(label) === `class ${label}` ? "" : ` (${label})`);
  if (state.model.classes) labels.sort((a, b) => shown(a).localeCompare(shown(b), undefined, { numeric: true }));
  for (const id of ["class", "edit-class"]) {
    $(id).replaceChildren(...labels.map((label) => new Option(shown(label), label)));
  }
}

async function start() {
  try {
    state.model = await (await ask("v1/model")).json();
  } catch (error) {
    $("error").textContent = error.message;
    return;
  }
  $("token-form").hidden = true;
  $("error").textContent = "";
  const { name, device, resolution, num_classes: classes, patch_nums: sides, defaults, limits } = state.model;
  document.title = `${name} · hmar-mega`;
  $("title").textContent = name;
  $("about").textContent = `${resolution}×${resolution} px · ${classes} classes · scales ${sides.join(" ")} · ${device}`;
  fillClasses();
  const own = { cfg: defaults.cfg, "mask-cfg": defaults.mask_cfg, "top-k": defaults.top_k, "top-p": defaults.top_p };
  for (const [id, value] of Object.entries(own)) $(id).placeholder = String(value);
  $("mask-schedule").placeholder = defaults.mask_schedule;
  $("schedules").replaceChildren(new Option("the model's own", defaults.mask_schedule), new Option("one pass a scale", "1"));
  for (const part of document.querySelectorAll(".masked")) part.hidden = !state.model.mask_branch;
  $("count").max = limits.count;
  $("count").value = Math.min($("count").value, limits.count);
  document.body.classList.toggle("small", resolution <= 128);
  editor.resize(resolution);
}

async function run(what, work) {
  if (!state.model || state.stop) return;
  state.stop = new AbortController();
  $("go").disabled = $("edit-go").disabled = true;
  $("stop").disabled = false;
  $("error").textContent = "";
  $("status").textContent = `${what} …`;
  try {
    await work(state.stop.signal);
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("status").textContent = stopped ? "Stopped." : "";
    if (!stopped) $("error").textContent = error instanceof Failure ? error.message : `No answer from the service: ${error.message}`;
  } finally {
    state.stop = null;
    $("go").disabled = false;
    $("stop").disabled = true;
    editor.refresh();
  }
}

// -------------------------------------------------------------------------------------------------------- the pictures

function figure(label, seed) {
  const image = new Image();
  image.alt = "";
  const text = document.createElement("span");
  text.textContent = `${className(label)}, seed\u00a0${seed}`;
  const edit = document.createElement("button");
  edit.type = "button";
  edit.textContent = "Edit";
  edit.disabled = true;
  edit.setAttribute("aria-label", `Edit ${text.textContent}`);
  edit.addEventListener("click", () => { editor.open(image, label); $("canvas").focus(); });
  const caption = document.createElement("figcaption");
  caption.append(text, edit);
  const whole = document.createElement("figure");
  whole.append(image, caption);
  return { whole, image, edit, text };
}

function showPicture(shown, picture, note) {
  shown.image.src = `data:image/png;base64,${picture.png}`;
  shown.image.alt = shown.text.textContent + (note ? `, ${note}` : "");
  shown.edit.disabled = Boolean(note);
}

function clearPictures() {
  $("pictures").replaceChildren();
  $("scales").replaceChildren();
  $("scales-title").hidden = true;
}

function showAll(answer) {
  clearPictures();
  for (const picture of answer.images) {
    const shown = figure(picture.class, picture.seed);
    showPicture(shown, picture);
    $("pictures").append(shown.whole);
  }
}

function seconds(value) { return `${value.toFixed(value < 1 ? 2 : 1)} s`; }

function plural(count) { return count === 1 ? "1 picture" : `${count} pictures`; }

async function draw(signal) {
  const label = Number($("class").value);
  const body = { classes: label, count: number("count"), ...sampling() };
  if (!$("show-scales").checked) {
    const answer = await (await ask("v1/images", body, signal)).json();
    showAll(answer);
    $("status").textContent = `${plural(answer.images.length)} in ${seconds(answer.seconds)}`;
    return;
  }
  const answer = await ask("v1/images/stream", body, signal);
  clearPictures();
  const shown = new Map();
  let sides = [];
  let ended = false;
  for await (const [name, data] of events(answer)) {
    if (name === "start") sides = data.scales;
    if (name === "error") throw new Failure(0, data.error);
    if (name === "done") { ended = true; $("status").textContent = `${plural(shown.size)} in ${seconds(data.seconds)}`; }
    if (name !== "scale") continue;
    const last = data.scale === sides.length;
    data.images.forEach((picture, i) => {
      const place = data.first + i;
      if (!shown.has(place)) {
        shown.set(place, figure(picture.class, picture.seed));
        $("pictures").append(shown.get(place).whole);
      }
      showPicture(shown.get(place), picture, last ? "" : `scale ${data.scale} of ${sides.length}`);
    });
    if (data.first === 0) showScale(data);
    $("status").textContent = `Scale ${data.scale} of ${sides.length} (${data.side}×${data.side} tokens)`;
  }
  if (!ended) throw new Failure(0, "the service ended the stream before the pictures were complete");
}

function showScale(data) {
  const image = new Image();
  image.src = `data:image/png;base64,${data.images[0].png}`;
  image.alt = `first picture after the scale of ${data.side}×${data.side} tokens`;
  const item = document.createElement("li");
  item.append(image, `${data.side}×${data.side}`);
  $("scales").append(item);
  $("scales-title").hidden = false;
}

// ---------------------------------------------------------------------------------------------------------- the editor

const editor = {
  size: 16, picture: null, mask: null, undo: [], at: null, last: null, keyboard: false,

  resize(size) {
    this.size = size;
    $("canvas").width = $("canvas").height = size;
    this.mask = new Uint8Array(size * size);
    this.at = [Math.floor(size / 2), Math.floor(size / 2)];
    $("brush").max = Math.max(2, Math.round(size / 3));
    $("brush").value = Math.max(1, Math.round(size / 4));
    $("brush-size").textContent = `${$("brush").value} px`;
    this.refresh();
  },

  open(image, label) {
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    const canvas = new OffscreenCanvas(this.size, this.size);
    const left = (image.naturalWidth - side) / 2, top = (image.naturalHeight - side) / 2;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";
    context.fillRect(0, 0, this.size, this.size);
    context.drawImage(image, left, top, side, side, 0, 0, this.size, this.size);
    this.picture = canvas;
    this.mask.fill(0);
    this.undo = [];
    if (label !== undefined) $("edit-class").value = label;
    this.refresh();
  },

  remember() {
    this.undo.push(this.mask.slice());
    if (this.undo.length > 50) this.undo.shift();
  },

  paint(x, y) {
    const radius = Number($("brush").value) / 2, value = $("erase").checked ? 0 : 1;
    for (let v = Math.max(0, Math.floor(y - radius)); v <= Math.min(this.size - 1, Math.ceil(y + radius)); v++) {
      for (let u = Math.max(0, Math.floor(x - radius)); u <= Math.min(this.size - 1, Math.ceil(x + radius)); u++) {
        if (Math.hypot(u + 0.5 - x, v + 0.5 - y) <= Math.max(radius, 0.71)) this.mask[v * this.size + u] = value;
      }
    }
  },

  line(from, to) {
    const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let i = 0; i <= steps; i++) {
      this.paint(from[0] + (i / steps) * (to[0] - from[0]), from[1] + (i / steps) * (to[1] - from[1]));
    }
    this.refresh();
  },

  refresh() {
    const context = $("canvas").getContext("2d", { willReadFrequently: true });
    context.clearRect(0, 0, this.size, this.size);
    if (this.picture) context.drawImage(this.picture, 0, 0);
    const pixels = context.getImageData(0, 0, this.size, this.size);
    let painted = false;
    for (let i = 0; i < this.mask.length; i++) {
      if (!this.mask[i]) continue;
      painted = true;
      [230, 40, 120].forEach((shade, c) => { pixels.data[4 * i + c] = 0.45 * pixels.data[4 * i + c] + 0.55 * shade; });
      pixels.data[4 * i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
    if (this.keyboard) {
      const radius = Math.max(0.7, Number($("brush").value) / 2);
      context.lineWidth = Math.max(0.5, this.size / 128);
      context.strokeStyle = "#0b57d0";
      context.beginPath();
      context.arc(this.at[0] + 0.5, this.at[1] + 0.5, radius, 0, 2 * Math.PI);
      context.stroke();
    }
    $("edit-go").disabled = !this.picture || !painted || Boolean(state.stop);
    $("undo").disabled = !this.undo.length;
  },

  async base64(draw) {
    const canvas = new OffscreenCanvas(this.size, this.size);
    draw(canvas.getContext("2d"));
    const bytes = new Uint8Array(await (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer());
    let text = "";
    for (const byte of bytes) text += String.fromCharCode(byte);
    return btoa(text);
  },

  async body() {
    const mask = await this.base64((context) => {
      const pixels = context.createImageData(this.size, this.size);
      this.mask.forEach((value, i) => pixels.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
      context.putImageData(pixels, 0, 0);
    });
    const image = await this.base64((context) => context.drawImage(this.picture, 0, 0));
    const label = Number($("edit-class").value);
    return { image, mask, class: label, count: number("count"), feather: number("feather") || 0, ...sampling() };
  },
};

async function edit(signal) {
  const answer = await (await ask("v1/edits", await editor.body(), signal)).json();
  showAll(answer);
  const kept = answer.images.map((picture) => picture.kept_psnr).filter((value) => value !== undefined);
  const told = kept.length ? `; kept pixels decoded at ${Math.min(...kept).toFixed(1)} dB, put back as they were` : "";
  $("status").textContent = `${plural(answer.images.length)} in ${seconds(answer.seconds)}${told}`;
}

function place(event) {
  const box = $("canvas").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * editor.size, ((event.clientY - box.top) / box.height) * editor.size];
}

function wireEditor() {
  const canvas = $("canvas");
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    editor.keyboard = false;
    editor.remember();
    editor.last = place(event);
    editor.line(editor.last, editor.last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!editor.last) return;
    const now = place(event);
    editor.line(editor.last, now);
    editor.last = now;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { editor.last = null; });
  canvas.addEventListener("blur", () => { editor.keyboard = false; editor.refresh(); });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = event.shiftKey ? Math.max(2, Math.round(editor.size / 8)) : Math.max(1, Math.round(editor.size / 64));
    if (moves[event.key]) {
      editor.at = editor.at.map((x, i) => Math.min(editor.size - 1, Math.max(0, x + step * moves[event.key][i])));
    } else if (event.key === " ") {
      editor.remember();
      editor.paint(editor.at[0] + 0.5, editor.at[1] + 0.5);
    } else return;
    event.preventDefault();
    editor.keyboard = true;
    editor.refresh();
  });
  $("brush").addEventListener("input", () => { $("brush-size").textContent = `${$("brush").value} px`; editor.refresh(); });
  $("undo").addEventListener("click", () => { editor.mask = editor.undo.pop(); editor.refresh(); });
  $("clear").addEventListener("click", () => { editor.remember(); editor.mask.fill(0); editor.refresh(); });
  $("invert").addEventListener("click", () => { editor.remember(); editor.mask = editor.mask.map((x) => 1 - x); editor.refresh(); });
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (!file) return;
    const image = new Image();
    image.addEventListener("load", () => { editor.open(image); URL.revokeObjectURL(image.src); });
    image.addEventListener("error", () => { $("error").textContent = `${file.name} is no picture that this browser reads.`; });
    image.src = URL.createObjectURL(file);
  });
}

$("draw").addEventListener("submit", (event) => { event.preventDefault(); run("Generating", draw); });
$("edit").addEventListener("submit", (event) => { event.preventDefault(); run("Editing", edit); });
$("stop").addEventListener("click", () => state.stop && state.stop.abort());
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 31); });
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim();
  sessionStorage.setItem("token", state.token);
  start();
});
wireEditor();
start();
