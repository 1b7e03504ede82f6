"use strict";

const at = (id) => document.getElementById(id);
const state = { image: null, attributes: null, asked: 0, addresses: [] };

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function asked(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ detail: response.statusText }));
  if (response.status === 401) {
    at("key-field").hidden = false;
    at("key").focus();
  }
  throw new Error(problem.detail || response.statusText);
}

function setImage(file) {
  state.image = file;
  state.attributes = null;
  const preview = at("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.hidden = !file;
  at("hint").hidden = Boolean(file);
  if (file) {
    preview.src = URL.createObjectURL(file);
    preview.alt = `The image ${file.name}`;
  } else {
    preview.removeAttribute("src");
    at("file").value = "";
  }
}

function body() {
  const form = new FormData();
  if (state.image) form.append("image", state.image);
  form.append("title", at("title").value);
  form.append("k", "12");
  if (state.attributes !== null) {
    form.append("attributes_source", "given");
    form.append("attributes", JSON.stringify(state.attributes));
  } else {
    form.append("attributes_source", at("attributes_source").value);
  }
  const category = at("category").value.trim();
  if (category) form.append("filters", JSON.stringify({ category }));
  return form;
}

async function search() {
  const number = ++state.asked;
  say("Searching…");
  try {
    const response = await asked("/v1/search", { method: "POST", body: body() });
    const answer = await response.json();
    if (number !== state.asked) return;
    show(answer);
    say(`${answer.hits.length} results`);
  } catch (error) {
    if (number === state.asked) say(error.message, true);
  }
}

function show(answer) {
  state.attributes = answer.attributes_source === "none" ? null : answer.attributes;
  showChips(answer);
  for (const address of state.addresses) URL.revokeObjectURL(address);
  state.addresses = [];
  at("hits").replaceChildren(...answer.hits.map(hitOf));
  const spent = Object.entries(answer.milliseconds).map(([stage, ms]) => `${stage} ${ms.toFixed(1)} ms`);
  at("times").textContent = spent.join(", ");
  at("served").textContent = `Round ${answer.round} (${answer.bundle})`;
}

function showChips(answer) {
  const pairs = Object.entries(answer.attributes);
  at("used").hidden = false;
  at("reason").textContent = pairs.length ? "" : answer.reason ? `No attributes: ${answer.reason}` : "No attributes.";
  at("chips").replaceChildren(
    ...pairs.map(([name, value]) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.setAttribute("aria-label", `Remove ${name}: ${value}`);
      const label = document.createElement("b");
      label.textContent = `${name}: `;
      const cross = document.createElement("i");
      cross.textContent = "×";
      chip.append(label, value, cross);
      chip.addEventListener("click", () => removePair(name));
      const entry = document.createElement("li");
      entry.append(chip);
      return entry;
    }),
  );
}

async function removePair(name) {
  const names = Object.keys(state.attributes);
  const place = names.indexOf(name);
  const rest = { ...state.attributes };
  delete rest[name];
  state.attributes = rest;
  await search();
  const chips = at("chips").querySelectorAll("button");
  (chips[Math.min(place, chips.length - 1)] || at("title")).focus();
}

function hitOf(hit) {
  const entry = document.createElement("li");
  entry.dataset.item = hit.item_id;
  const image = document.createElement("img");
  image.className = "image";
  image.alt = hit.title || hit.item_id;
  const score = document.createElement("p");
  score.className = "score";
  score.textContent = hit.score.toFixed(4);
  const title = document.createElement("p");
  title.className = "title";
  title.textContent = hit.title || hit.item_id;
  const pairs = document.createElement("p");
  pairs.className = "pairs";
  pairs.textContent = Object.entries(hit.attributes).map(([name, value]) => `${name}: ${value}`).join("; ");
  entry.append(image, score, title, pairs);
  asked(hit.thumbnail)
    .then((response) => response.blob())
    .then((blob) => {
      const address = URL.createObjectURL(blob);
      state.addresses.push(address);
      image.src = address;
    })
    .catch(() => image.removeAttribute("src"));
  return entry;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.attributes = null;
  if (at("key").value) sessionStorage.setItem("key", at("key").value);
  search();
});
at("clear").addEventListener("click", () => {
  state.asked++;
  setImage(null);
  for (const id of ["title", "category"]) at(id).value = "";
  at("hits").replaceChildren();
  for (const id of ["times", "served"]) at(id).textContent = "";
  at("used").hidden = true;
  say("");
  at("title").focus();
});
at("file").addEventListener("change", () => {
  if (at("file").files.length) setImage(at("file").files[0]);
});
for (const kind of ["dragenter", "dragover"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
  });
}
at("drop").addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) setImage(file);
});
