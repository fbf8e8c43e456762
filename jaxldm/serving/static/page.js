// The page of a server: a form after the API's own description, and a strip of past pictures.

import { ask, encoded, events, Problem, sayOf, TOKEN } from "./server.js";

const KEPT = 40; // pictures in the strip
const THUMBNAIL = 160; // pixels of those that outlive the page
const STORE = "jaxldm.pictures";
const PREVIEWS = 12;
const CHIPS = 24; // classes that get a button of their own
const NUMBERS = ["num_images", "num_inference_steps", "guidance_scale", "strength", "seed"];
const LABELS = ["class_labels", "negative_labels"];
const TEXTS = ["prompt", "negative_prompt", "solver"];

const $ = (id) => document.getElementById(id);
let fields = {}; // of POST /generate: name -> JSON schema
let model = {};
let running = null; // {controller, id, cancelled} of the request under way
let pictures = []; // newest first: {model, settings, image, src}
let chosen = null;
let begin = null; // the picture to start from: {image, url}; the url is what was sent before
let timer = 0; // of the next look at /ready

// ---------------------------------------------------------------- the form

function buildForm() {
  const sizes = model.sizes ?? [];
  for (const row of document.querySelectorAll("[data-field]")) {
    const name = row.dataset.field;
    row.hidden = name === "size" ? sizes.length < 2 : !(name in fields);
    // What is hidden must not stand in the way of what is shown.
    for (const input of row.querySelectorAll("input, select, textarea")) input.disabled = row.hidden;
  }
  for (const help of document.querySelectorAll("[data-help]")) help.hidden = !(help.dataset.help in fields);
  for (const name of NUMBERS) {
    if (fields[name]?.minimum !== undefined) $(name).min = fields[name].minimum;
    if (fields[name]?.maximum !== undefined) $(name).max = fields[name].maximum;
  }
  $("num_images").placeholder = "class_labels" in fields ? "one a class" : "1";
  $("num_inference_steps").placeholder = model.default_steps;
  $("guidance_scale").placeholder = model.default_guidance_scale;
  $("strength").placeholder = fields.strength?.default;
  fill($("solver"), (fields.solver?.enum ?? []).map((name) => [name, name]));
  fill($("size"), sizes.map(({ height, width }) => [`${height}x${width}`, `${width} × ${height}`]));
  buildChips();
  showBegin();
}

function fill(select, choices) {
  select.replaceChildren(...choices.map(([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text })));
}

function buildChips() {
  const names = model.class_names?.length ? model.class_names : [...Array(model.num_classes ?? 0).keys()].map(String);
  $("names").replaceChildren(...names.slice(0, 2000).map((value) => Object.assign(document.createElement("option"), { value })));
  if (!("class_labels" in fields) || names.length > CHIPS) return;
  const chips = names.map((name) => {
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    chip.addEventListener("click", () => {
      const words = wordsOf("class_labels");
      const without = words.filter((word) => word !== name);
      $("class_labels").value = (without.length < words.length ? without : [...words, name]).join(", ");
      pressChips();
    });
    return chip;
  });
  $("chips").replaceChildren(...chips);
  pressChips();
}

function pressChips() {
  const words = wordsOf("class_labels");
  for (const chip of $("chips").children) chip.setAttribute("aria-pressed", words.includes(chip.textContent));
}

const wordsOf = (name) => $(name).value.split(",").map((word) => word.trim()).filter(Boolean);

function readForm() {
  if (!$("lock").checked || $("seed").value === "") {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  }
  const settings = {};
  for (const name of TEXTS) if (name in fields && $(name).value.trim()) settings[name] = $(name).value.trim();
  for (const name of LABELS) {
    const words = name in fields ? wordsOf(name) : [];
    if (words.length) settings[name] = words.map((word) => (/^\d{1,9}$/.test(word) ? Number(word) : word));
  }
  for (const name of NUMBERS) if (name in fields && !$(name).disabled && $(name).value !== "") settings[name] = Number($(name).value);
  settings.guidance_scale ??= model.default_guidance_scale; // copied settings say all that the picture depends on
  if (!$("size").disabled) [settings.height, settings.width] = $("size").value.split("x").map(Number);
  if (begin && "image" in fields) {
    const { height, width } = settings.height ? settings : model.sizes[0];
    settings.image = begin.url ?? encoded(begin.image, height, width);
    settings.strength ??= fields.strength.default;
  }
  return settings;
}

function fillForm(settings) {
  for (const name of [...TEXTS, ...NUMBERS]) if (name !== "solver") $(name).value = settings[name] ?? "";
  for (const name of LABELS) $(name).value = [settings[name] ?? []].flat().join(", ");
  if (settings.solver) $("solver").value = settings.solver;
  if (settings.height) $("size").value = `${settings.height}x${settings.width}`;
  $("lock").checked = settings.seed !== undefined;
  pressChips();
  if (settings.image) startFrom(settings.image.startsWith("data:") ? settings.image : `data:image/png;base64,${settings.image}`, true);
  else startFromNoise();
}

// ---------------------------------------------------------------- a picture to start from

async function startFrom(url, asIs = false) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    startFromNoise();
    return showError("This is no picture that the browser can read. Choose a PNG, JPEG or WebP.", "image");
  }
  begin = { image, url: asIs ? url : null };
  showError(null);
  showBegin();
}

function startFromNoise() {
  begin = null;
  $("image").value = "";
  showBegin();
}

function showBegin() {
  const row = document.querySelector("[data-field=strength]");
  row.hidden = $("strength").disabled = !begin || !("strength" in fields);
  $("start").hidden = !begin;
  if (begin) $("start-picture").src = begin.image.src;
}

function readFile(file) {
  const reader = new FileReader();
  reader.addEventListener("load", () => startFrom(reader.result));
  reader.readAsDataURL(file);
}

// ---------------------------------------------------------------- drawing

async function draw() {
  if (running) return;
  showError(null);
  const settings = readForm();
  running = { controller: new AbortController(), id: null, cancelled: false };
  showBusy(true);
  try {
    const body = JSON.stringify({ ...settings, stream: true, previews: PREVIEWS });
    const headers = { "Content-Type": "application/json" };
    const response = await ask("generate", { method: "POST", headers, body, signal: running.controller.signal });
    await follow(response, settings);
  } catch (error) {
    if (running.cancelled || error.name === "AbortError") showProgress(0, "Cancelled.");
    else fail(error);
  } finally {
    for (const blank of document.querySelectorAll("#figures button:disabled")) blank.remove();
    running = null;
    showBusy(false);
  }
}

async function follow(response, settings) {
  const number = settings.num_images ?? settings.class_labels?.length ?? 1;
  const figures = blanks(number, settings);
  const steps = Array(number).fill(0);
  showProgress(0, "Waiting for a free place.");
  $("progress-line").scrollIntoView({ block: "nearest" }); // on a phone it is below the form
  for await (const [name, data] of events(response.body)) {
    if (name === "accepted") running.id = data.id;
    if (name === "queue") showProgress(0, placeIn(data));
    if (name === "progress") {
      steps[data.image] = data.step / data.steps;
      showProgress(mean(steps), `Step ${data.step} of ${data.steps}`);
      if (data.preview) show(figures[data.image], `data:image/png;base64,${data.preview}`);
    }
    if (name === "image") {
      steps[data.image] = 1;
      showProgress(mean(steps), number > 1 ? `${steps.filter((one) => one === 1).length} of ${number} pictures` : "");
      const picture = { model: model.id, settings, image: data.image, src: `data:image/png;base64,${data.b64}` };
      keep(picture, figures[data.image]);
    }
    if (name === "error") throw new Problem(sayOf(data.error), { param: data.error.param });
    if (name === "done") {
      settings.num_inference_steps ??= data.num_inference_steps;
      choose(chosen);
      store();
      return showProgress(1, `Done in ${(data.latency_ms / 1000).toFixed(1)} s`);
    }
  }
  throw new Problem("The connection ended before the pictures were done. Try again.");
}

const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;

function placeIn({ ahead, seconds }) {
  const wait = seconds >= 1 ? `, about ${Math.round(seconds)} s` : "";
  return ahead ? `Place ${ahead + 1} in the queue${wait}` : `Next in the queue${wait}`;
}

function cancel() {
  if (!running) return;
  running.cancelled = true;
  running.controller.abort(); // the server ends what nobody listens to
}

function blanks(number, settings) {
  const { height, width } = settings.height ? settings : (model.sizes?.[0] ?? { height: 1, width: 1 });
  $("figures").style.setProperty("--shape", `${width} / ${height}`);
  choose(null);
  const figures = [...Array(number).keys()].map(() => {
    const button = Object.assign(document.createElement("button"), { type: "button", disabled: true });
    const image = Object.assign(document.createElement("img"), { className: "blank", alt: "Being drawn" });
    image.src = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>";
    button.append(image);
    return button;
  });
  $("figures").replaceChildren(...figures);
  return figures;
}

function show(button, src) {
  const image = button.querySelector("img");
  image.src = src;
  image.className = "small";
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 128);
}

// ---------------------------------------------------------------- past pictures

function nameOf({ settings }) {
  const what = settings.prompt ?? `classes ${[settings.class_labels ?? []].flat().join(", ")}`;
  return `${what}, seed ${settings.seed}`;
}

function keep(picture, button) {
  pictures = [picture, ...pictures].slice(0, KEPT);
  show(button, picture.src);
  button.disabled = false;
  button.querySelector("img").alt = nameOf(picture);
  button.addEventListener("click", () => choose(picture));
  button.picture = picture;
  showStrip();
  choose(picture);
  store();
}

function showStrip() {
  const items = pictures.map((picture) => {
    const button = Object.assign(document.createElement("button"), { type: "button", title: nameOf(picture) });
    button.append(Object.assign(document.createElement("img"), { alt: nameOf(picture) }));
    show(button, picture.src);
    button.picture = picture;
    button.addEventListener("click", () => {
      if (!running) exhibit(picture);
      choose(picture);
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  $("strip").replaceChildren(...items);
  $("past").hidden = !pictures.length;
}

function exhibit(picture) {
  const button = Object.assign(document.createElement("button"), { type: "button" });
  button.append(Object.assign(document.createElement("img"), { alt: nameOf(picture) }));
  button.picture = picture;
  show(button, picture.src);
  $("figures").replaceChildren(button);
  $("progress-line").hidden = true;
}

function choose(picture) {
  chosen = picture;
  $("chosen").hidden = !picture;
  for (const button of document.querySelectorAll("#strip button, #figures button")) {
    button.setAttribute("aria-current", Boolean(picture) && button.picture === picture);
  }
  if (!picture) return;
  $("settings").textContent = asText(picture.settings, true);
  $("start-here").hidden = !("image" in fields) || Boolean(picture.small);
  $("save").href = picture.src;
  $("save").download = `${picture.model}-${picture.settings.seed}-${picture.image}.png`;
}

// JSON in one line that can be read; a picture in it is not shown.
function asText(settings, short) {
  const image = settings.image && (short ? `${settings.image.slice(0, 22)}…` : settings.image);
  return JSON.stringify(image ? { ...settings, image } : settings, null, 1).replace(/\n\s*/g, " ");
}

async function copy() {
  const text = asText(chosen.settings);
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers lend the clipboard to https and localhost only: the old way works elsewhere.
    $("settings").textContent = text;
    getSelection().selectAllChildren($("settings"));
    document.execCommand("copy");
    choose(chosen);
  }
  say($("copy"), "Copied");
}

function say(button, text) {
  const before = (button.dataset.text ??= button.textContent);
  button.textContent = text;
  setTimeout(() => (button.textContent = before), 1500);
}

function remove() {
  pictures = pictures.filter((picture) => picture !== chosen);
  for (const button of document.querySelectorAll("#figures button")) if (button.picture === chosen) button.remove();
  choose(null);
  showStrip();
  store();
}

async function store() {
  const small = await Promise.all(pictures.map(async (picture) => {
    const src = (picture.thumbnail ??= await thumbnail(picture.src));
    return { ...picture, src, small: picture.small || src !== picture.src };
  }));
  for (let kept = small; ; kept = kept.slice(0, -1)) {
    try {
      return localStorage.setItem(STORE, JSON.stringify(kept.map(({ thumbnail, ...rest }) => rest)));
    } catch {
      if (!kept.length) return; // no room, or no storage in a private window: the strip ends with the page
    }
  }
}

async function thumbnail(src) {
  const image = new Image();
  image.src = src;
  await image.decode();
  const scale = Math.min(1, THUMBNAIL / Math.max(image.naturalWidth, image.naturalHeight));
  if (scale === 1) return src;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(image.naturalWidth * scale);
  canvas.height = Math.round(image.naturalHeight * scale);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.85);
}

function restore() {
  try {
    pictures = JSON.parse(localStorage.getItem(STORE) ?? "[]");
  } catch {
    pictures = []; // written by another version
  }
  showStrip();
}

// ---------------------------------------------------------------- what is said

function showBusy(busy) {
  $("draw").disabled = busy;
  $("cancel").hidden = !busy;
  if (busy) $("progress-line").hidden = false;
}

function showProgress(value, text) {
  $("progress").value = value;
  $("progress-text").textContent = text;
}

function fail(error) {
  $("progress-line").hidden = true;
  showProgress(0, "");
  showError(error.message, error.param);
  if (error.status === 401) lock();
}

function lock() {
  $("ask-token").hidden = false;
  $("main").hidden = true;
  $("token-error").textContent = sessionStorage.getItem(TOKEN) ? "This is not the token of this server." : "";
  $("state").textContent = "Locked";
  $("token").focus();
}

function showError(message, param) {
  $("error").hidden = !message;
  $("error").textContent = message ?? "";
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  const input = message && param && $("form").elements[param === "height" ? "size" : param];
  if (input && !input.disabled) {
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", "error");
    input.focus();
  }
}

// ---------------------------------------------------------------- the start

async function start() {
  try {
    const [models, api] = await Promise.all(["models", "openapi.json"].map(async (path) => (await ask(path)).json()));
    model = models.models[0];
    fields = api.paths["/generate"].post.requestBody.content["application/json"].schema.properties;
  } catch (error) {
    fail(error);
    if (error.status === 401) return;
    $("state").textContent = "Not reached";
    setTimeout(start, 2000);
    return;
  }
  showError(null);
  $("ask-token").hidden = true;
  $("main").hidden = false;
  $("model").textContent = document.title = model.id;
  buildForm();
  whenReady();
}

async function whenReady() {
  let ready = false;
  try {
    ready = (await fetch("ready")).ok;
    $("state").textContent = ready ? "Ready" : "The model is being compiled; this takes a while.";
  } catch {
    $("state").textContent = "The server cannot be reached.";
  }
  if (!running) $("draw").disabled = !ready;
  clearTimeout(timer);
  timer = setTimeout(whenReady, ready ? 10000 : 1000);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("ask-token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value);
  start();
});
$("cancel").addEventListener("click", cancel);
$("class_labels").addEventListener("input", pressChips);
$("use").addEventListener("click", () => {
  fillForm(chosen.settings);
  $("draw").focus();
});
$("start-here").addEventListener("click", () => {
  $("image").value = ""; // the name of another file
  startFrom(chosen.src);
  $("prompt").focus();
});
$("image").addEventListener("change", () => ($("image").files.length ? readFile($("image").files[0]) : startFromNoise()));
$("start-from-noise").addEventListener("click", () => {
  startFromNoise();
  $("image").focus();
});
$("copy").addEventListener("click", copy);
$("remove").addEventListener("click", remove);
$("strip").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const buttons = [...$("strip").querySelectorAll("button")];
  buttons[buttons.indexOf(document.activeElement) + (step ?? 0)]?.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") cancel();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("draw").disabled) $("form").requestSubmit();
});
$("prompt").addEventListener("keydown", (event) => {
  // isComposing: Enter ends a word of an input method, as for Japanese.
  if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
  event.preventDefault();
  if (!$("draw").disabled) $("form").requestSubmit();
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file && "image" in fields) {
    event.preventDefault();
    return readFile(file);
  }
  let settings = null;
  try {
    settings = JSON.parse(event.clipboardData.getData("text"));
  } catch {
    return; // ordinary text, for the field that has the focus
  }
  if (settings === null || typeof settings !== "object" || Array.isArray(settings)) return;
  event.preventDefault();
  fillForm(settings);
});

restore();
buildForm(); // without fields: nothing that cannot be seen is required
start();
