// Search page: a photo, a part of it, or words in; products out. Talks to its own host only, by relative URLs.

const $ = (id) => document.getElementById(id);
const STEP = 12; // products shown at once, and more with each "Show more"
const MOST = 100;
const LONGEST_SIDE = 2400; // pixels, of a photo that is too large in bytes and therefore made smaller here
const TOUCH = "touch";

const state = {
  about: null,
  file: null, // Blob of the query photo
  box: null, // {x, y, width, height} in pixels of the photo
  filters: new Map(), // attribute -> Set of values
  k: STEP,
  shown: null, // product in the dialog
  running: null, // AbortController of the search under way
};

// --- talking to the service ---

class Refused extends Error {}

async function ask(url, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(url, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service cannot be reached. Check the connection, then try again.");
  }
  if (answer.status === 401) {
    await askForKey(Boolean(key));
    return ask(url, options);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Refused(sentence(told.error ?? `The service answered ${answer.status}.`));
  }
  return answer;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

let asking = null; // one question for all requests that wait for the key
function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    $("ask-title").textContent = wrong ? "Another API key, please" : "API key";
    $("ask").addEventListener("close", () => {
      sessionStorage.setItem("key", $("key").value.trim());
      $("key").value = "";
      asking = null;
      resolve();
    }, { once: true });
    $("ask").showModal();
  });
  return asking;
}
$("ask").addEventListener("cancel", (event) => event.preventDefault());

// An <img> sends no key, so that with one its picture is fetched.
function show(image, url) {
  if (!sessionStorage.getItem("key")) {
    image.src = url;
    return;
  }
  ask(url).then((answer) => answer.blob()).then((blob) => {
    image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
    image.src = URL.createObjectURL(blob);
  }).catch(() => {});
}

// --- search ---

async function search() {
  const text = $("text").value.trim();
  if (state.about.takes === "image" ? !state.file : !text) return;
  state.running?.abort();
  const running = (state.running = new AbortController());
  const url = new URLSearchParams({ k: state.k });
  if (state.box) url.set("box", [state.box.x, state.box.y, state.box.width, state.box.height].join(","));
  for (const [name, values] of state.filters) for (const value of values) url.append("filter", `${name}=${value}`);
  const options = state.about.takes === "image"
    ? photoBody()
    : { body: JSON.stringify({ text }), headers: { "Content-Type": "application/json" } };
  busy(true);
  try {
    const started = performance.now();
    const answer = await ask(`search?${url}`, { method: "POST", signal: running.signal, ...options });
    showFound((await answer.json()).found, performance.now() - started);
  } catch (error) {
    if (error.name === "AbortError") return; // another search has taken its place
    showError(error instanceof Refused ? error.message : `This page failed: ${error.message}`);
  }
  if (state.running === running) busy(false);
}

const photoBody = () => ({ body: state.file, headers: { "Content-Type": state.file.type.startsWith("image/") ? state.file.type : "image/jpeg" } });

function busy(yes) {
  $("results").setAttribute("aria-busy", yes);
  if (!yes) return;
  $("status").textContent = "Searching…";
  if (!$("cards").querySelector(".card")) {
    $("notice").hidden = true;
    $("cards").replaceChildren(...Array.from({ length: 8 }, () => element("li", "ghost")));
  }
}

function showFound(found, milliseconds) {
  $("cards").replaceChildren(...found.map(card));
  const products = found.length === 1 ? "1 product" : `${found.length} products`;
  $("status").textContent = found.length ? `${products}, best first, in ${(milliseconds / 1000).toFixed(2)} s` : "";
  $("notice").hidden = found.length > 0;
  $("more").hidden = found.length < state.k || state.k >= MOST;
  if (!found.length) {
    notice("No product matches these filters", "Other values, or fewer of them, may find some.");
    if (chosen()) $("notice").append(button("Clear filters", clearFilters));
    $("status").textContent = "0 products";
  }
}

function showError(message) {
  $("cards").replaceChildren();
  $("more").hidden = true;
  $("status").textContent = "";
  notice("That did not work", message, true);
  $("notice").append(button("Try again", search));
}

function notice(title, text, bad = false) {
  const box = $("notice");
  box.hidden = false;
  box.className = bad ? "bad" : "";
  box.toggleAttribute("role", bad);
  if (bad) box.setAttribute("role", "alert");
  box.replaceChildren(element("h3", "", title), element("p", "", text));
}

function card(product, place) {
  const score = Math.max(0, Math.min(1, product.score));
  const image = element("img");
  image.alt = "";
  image.loading = place < 8 ? "eager" : "lazy";
  show(image, product.thumbnail);
  const shot = element("span", "shot");
  shot.append(image);
  const bar = element("i");
  bar.style.setProperty("--share", `${100 * score}%`);
  const meter = element("span", "meter");
  meter.append(bar, element("span", "", product.score.toFixed(2)));
  meter.title = "Cosine similarity to your query: 1 is the most";
  const words = element("span", "words");
  words.append(element("b", "", product.title || product.id), meter);
  const tags = Object.values(product.attributes).join(" · ");
  if (tags) words.append(element("span", "tags", tags));
  const whole = element("button", "card");
  whole.type = "button";
  whole.setAttribute("aria-label", `${place + 1}. ${product.title || product.id}, similarity ${product.score.toFixed(2)}, ${tags}`);
  whole.append(shot, words);
  whole.addEventListener("click", () => showDetail(product));
  const item = element("li");
  item.append(whole);
  return item;
}

function showDetail(product) {
  state.shown = product;
  $("detail-photo").removeAttribute("src");
  show($("detail-photo"), product.thumbnail);
  $("detail-title").textContent = product.title || product.id;
  $("detail-text").textContent = product.description;
  const facts = { similarity: product.score.toFixed(4), ...product.attributes, id: product.id };
  $("detail-facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element("dt", "", label(name)), element("dd", "", value)]));
  showParts(product.parts);
  $("why").hidden = true;
  $("detail").showModal();
  if (state.file && $("photo").naturalWidth) explain(product).catch(() => {}); // an extra: without it nothing is missing
}

// Shares of the parts in the product's embedding; a part may point away from the others and have less than none.
function showParts(parts) {
  const shares = Object.entries(parts);
  $("made").hidden = !shares.length;
  $("made-bar").replaceChildren(...shares.map(([, share]) => {
    const bar = element("i");
    bar.style.flexGrow = Math.max(0, share);
    return bar;
  }));
  $("made-parts").replaceChildren(...shares.map(([name, share]) => element("li", "", `${label(name)} ${Math.round(100 * share)} %`)));
}

// Cells of the photo, or of its part, that are less like the product than others are darkened.
async function explain(product) {
  const box = state.box ?? { x: 0, y: 0, ...size() }, { x, y, width, height } = box;
  const url = new URLSearchParams({ row: product.row, artefact: new URLSearchParams(product.thumbnail.split("?")[1]).get("artefact") });
  if (state.box) url.set("box", [x, y, width, height].join(","));
  const { columns, similarity } = await (await ask(`explain?${url}`, { method: "POST", ...photoBody() })).json();
  if (state.shown !== product) return;
  const canvas = $("why-photo"), scale = Math.min(1, 400 / Math.max(width, height));
  Object.assign(canvas, { width: Math.ceil(scale * width), height: Math.ceil(scale * height) });
  const pen = canvas.getContext("2d"), least = Math.min(...similarity), most = Math.max(...similarity);
  pen.drawImage($("photo"), x, y, width, height, 0, 0, canvas.width, canvas.height);
  const shade = new OffscreenCanvas(columns, columns), pixels = new ImageData(columns, columns);
  similarity.forEach((value, n) => { pixels.data[4 * n + 3] = (190 * (most - value)) / (most - least || 1); }); // opacity of black
  shade.getContext("2d").putImageData(pixels, 0, 0);
  pen.drawImage(shade, 0, 0, canvas.width, canvas.height);
  const best = similarity.indexOf(most);
  canvas.setAttribute("aria-label", `Most like it: row ${Math.floor(best / columns) + 1}, column ${(best % columns) + 1} of ${columns}`);
  $("why").hidden = false;
}
$("detail").addEventListener("click", (event) => event.target === $("detail") && $("detail").close());

$("more").addEventListener("click", () => {
  state.k = Math.min(MOST, state.k + STEP);
  search();
});
$("words").addEventListener("submit", (event) => {
  event.preventDefault();
  state.k = STEP;
  search();
});

// --- photo ---

async function take(file) {
  if (!file || state.about?.takes !== "image") return;
  if (file.type && !file.type.startsWith("image/")) {
    showError(`${file.name || "This file"} is not a photo.`);
    return;
  }
  const small = file.size > state.about.max_bytes ? await shrunk(file).catch(() => file) : file;
  URL.revokeObjectURL($("photo").src);
  Object.assign(state, { file: small, k: STEP });
  setBox(null);
  $("photo").src = URL.createObjectURL(small);
  $("invite").hidden = true;
  $("stage").hidden = $("tools").hidden = false;
  search();
}

async function shrunk(file) {
  const bitmap = await createImageBitmap(file);
  for (let side = LONGEST_SIDE; ; side *= 0.7) {
    const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.ceil(scale * bitmap.width), Math.ceil(scale * bitmap.height));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const made = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
    if (made.size <= state.about.max_bytes || side < 100) return made;
  }
}

for (const id of ["file", "camera", "another"]) {
  $(id).addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
}
$("photo").addEventListener("load", () => $("frame").style.setProperty("--ratio", size().width / size().height));
$("photo").addEventListener("error", () => { $("hint").textContent = "This browser cannot show the photo; the search reads it all the same."; });
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});

// --- part of the photo ---

const size = () => ({ width: $("photo").naturalWidth, height: $("photo").naturalHeight });
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

function setBox(box) {
  const { width, height } = size();
  if (box) {
    const x = clamp(Math.round(box.x), 0, width - 1), y = clamp(Math.round(box.y), 0, height - 1);
    box = { x, y, width: clamp(Math.round(box.width), 1, width - x), height: clamp(Math.round(box.height), 1, height - y) };
  }
  state.box = box;
  $("box").hidden = $("whole").hidden = !box;
  $("part").hidden = Boolean(box);
  if (!box) return;
  Object.assign($("box").style, {
    left: `${(100 * box.x) / width}%`, top: `${(100 * box.y) / height}%`,
    width: `${(100 * box.width) / width}%`, height: `${(100 * box.height) / height}%`,
  });
  $("box").setAttribute("aria-label", `${box.width} by ${box.height} pixels at ${box.x}, ${box.y}. Arrow keys move it, with Shift they change its size, Delete removes it.`);
}

let later = 0;
function searchSoon(milliseconds = 350) {
  clearTimeout(later);
  state.k = STEP;
  later = setTimeout(search, milliseconds);
}

function place(event) {
  const frame = $("photo").getBoundingClientRect(), { width, height } = size();
  return { x: clamp(((event.clientX - frame.left) / frame.width) * width, 0, width), y: clamp(((event.clientY - frame.top) / frame.height) * height, 0, height) };
}

// A finger scrolls the page over the photo, and moves or resizes only a part that was marked; a mouse or a pen draws.
$("frame").addEventListener("pointerdown", (event) => {
  const corner = event.target.dataset.corner, within = event.target === $("box");
  if (event.button || (event.pointerType === TOUCH && !corner && !within) || !$("photo").naturalWidth) return;
  event.preventDefault();
  const before = state.box, start = place(event);
  const fixed = corner && {
    x: corner.includes("w") ? before.x + before.width : before.x,
    y: corner.includes("n") ? before.y + before.height : before.y,
  };
  $("frame").setPointerCapture(event.pointerId);
  const move = (moved) => {
    const now = place(moved), { width, height } = size();
    if (within) {
      setBox({ ...before, x: clamp(before.x + now.x - start.x, 0, width - before.width), y: clamp(before.y + now.y - start.y, 0, height - before.height) });
      return;
    }
    const from = fixed || start;
    setBox({ x: Math.min(from.x, now.x), y: Math.min(from.y, now.y), width: Math.abs(now.x - from.x), height: Math.abs(now.y - from.y) });
  };
  const end = () => {
    $("frame").removeEventListener("pointermove", move);
    const least = Math.min(size().width, size().height) / 32; // less is a click, not a part
    if (state.box && (state.box.width < least || state.box.height < least)) setBox(before);
    if (JSON.stringify(state.box) === JSON.stringify(before)) return;
    $("box").focus({ preventScroll: true });
    searchSoon(0);
  };
  $("frame").addEventListener("pointermove", move);
  $("frame").addEventListener("lostpointercapture", end, { once: true });
});

$("part").addEventListener("click", () => {
  const { width, height } = size();
  if (!width) return;
  setBox({ x: width / 5, y: height / 5, width: 0.6 * width, height: 0.6 * height });
  $("box").focus();
  searchSoon();
});
$("whole").addEventListener("click", () => removeBox());
function removeBox() {
  setBox(null);
  $("part").focus();
  searchSoon(0);
}

$("box").addEventListener("keydown", (event) => {
  const step = Math.max(1, Math.round(Math.max(size().width, size().height) / 40));
  const [dx, dy] = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key] ?? [0, 0];
  const { x, y, width, height } = state.box;
  if (["Delete", "Backspace", "Escape"].includes(event.key)) removeBox();
  else if (!dx && !dy) return;
  else if (event.shiftKey) setBox({ x, y, width: width + dx, height: height + dy });
  else setBox({ x: clamp(x + dx, 0, size().width - width), y: clamp(y + dy, 0, size().height - height), width, height });
  event.preventDefault();
  if (dx || dy) searchSoon();
});

// --- filters ---

const chosen = () => [...state.filters.values()].reduce((count, values) => count + values.size, 0);

function showFilters(filters) {
  const groups = Object.entries(filters).filter(([, values]) => values.length > 1);
  $("filters").hidden = !groups.length;
  $("filters").open = matchMedia("(min-width: 801px)").matches;
  $("attributes").replaceChildren(...groups.map(([name, values]) => {
    const group = element("fieldset"), pills = element("div", "pills");
    pills.append(...values.map((value) => {
      const pill = element("label", "pill"), tick = element("input");
      tick.type = "checkbox";
      tick.addEventListener("change", () => {
        const set = state.filters.get(name) ?? new Set();
        if (tick.checked) set.add(value); else set.delete(value);
        state.filters.set(name, set);
        filtersChanged();
      });
      pill.append(tick, value);
      return pill;
    }));
    group.append(element("legend", "", label(name)), pills);
    return group;
  }));
}

function filtersChanged() {
  $("chosen").textContent = chosen();
  $("chosen").hidden = $("clear").hidden = !chosen();
  searchSoon(0);
}

function clearFilters() {
  state.filters.clear();
  for (const tick of $("attributes").querySelectorAll("input")) tick.checked = false;
  filtersChanged();
}
$("clear").addEventListener("click", clearFilters);

// --- start ---

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

const label = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");

function welcome() {
  const { takes, documents } = state.about;
  if (takes === "text") {
    notice("Products appear here", "Describe what you look for in a few words.");
    return;
  }
  notice("Products appear here", "No photo at hand? Start with one of the catalogue's own:");
  const rows = new Set(Array.from({ length: 6 }, (_, n) => Math.floor(((n + 0.5) / 6) * documents)));
  const samples = element("ul", "samples");
  samples.append(...[...rows].map((row, n) => {
    const url = `documents/${row}/thumbnail?artefact=${state.about.artefact}`;
    const image = element("img"), item = element("li");
    const start = button("", async () => take(await (await ask(url)).blob()));
    start.setAttribute("aria-label", `Search with sample photo ${n + 1}`);
    image.alt = "";
    show(image, url);
    start.append(image);
    item.append(start);
    return item;
  }));
  $("notice").append(samples);
}

async function start() {
  try {
    state.about = await (await ask("artefact")).json();
  } catch (error) {
    notice("The service does not answer", error.message, true);
    $("notice").append(button("Try again", start));
    return;
  }
  const { takes, documents, method } = state.about;
  $("about").textContent = `${documents.toLocaleString("en")} products · ${method}`;
  $("words").hidden = takes !== "text";
  $("picture").hidden = takes === "text";
  if (matchMedia("(hover: none)").matches) $("hint").textContent = "Mark a part of the photo to search for that part only.";
  showFilters(state.about.filters);
  welcome();
}
start();
