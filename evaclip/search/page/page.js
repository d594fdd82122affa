"use strict";
// One page: words, a dropped image, or a row of the index go to /search; thumbnails come back one by one.
// The token, where the service asks for one, is in the address after "#token=", which browsers send to nobody.
const at = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};
const LARGEST = 4e6; // bytes of an image that is sent as it is; larger ones are made smaller first
let image = null, asked = 0, shown = [];

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function search(query) {
  const turn = ++asked;
  say("searching...");
  try {
    const answer = await fetch("search", {
      method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(query),
    });
    const found = await answer.json();
    if (turn !== asked) return; // a later question was faster
    if (!answer.ok) return say(typeof found.detail === "string" ? found.detail : "the query cannot be used", true);
    show(found.results);
    say(`${found.results.length} results in ${Math.round(found.milliseconds)} ms`);
  } catch (error) {
    if (turn === asked) say(`the service does not answer: ${error.message}`, true);
  }
}

function show(results) {
  shown.forEach(URL.revokeObjectURL);
  shown = [];
  at("grid").replaceChildren(...results.map(card));
}

function card(result) {
  const made = at("card").content.cloneNode(true).firstElementChild;
  const picture = made.querySelector("img");
  made.dataset.row = result.row;
  made.querySelector(".score").textContent = result.score.toFixed(4);
  made.querySelector(".key").textContent = result.key;
  made.querySelector(".like").addEventListener("click", () => {
    at("text").value = at("without").value = "";
    forget();
    search({ like: [result.row] });
  });
  if (result.place === "line") {
    picture.hidden = true;
    made.querySelector(".words").textContent = result.caption;
    return made;
  }
  picture.alt = result.caption || result.key;
  fetch(`thumbnail/${result.row}`, { headers }).then(async (answer) => {
    if (!answer.ok) throw new Error((await answer.json()).detail);
    picture.src = URL.createObjectURL(await answer.blob());
    shown.push(picture.src);
  }).catch((error) => {
    picture.hidden = true;
    made.querySelector(".words").textContent = error.message;
  });
  return made;
}

function ask() {
  const words = (id) => at(id).value.trim() ? [at(id).value.trim()] : [];
  const query = { text: words("text"), without: words("without"), image: image ? [image] : [] };
  if (query.text.length || query.image.length) search(query);
  else say("type something, or drop an image");
}

async function take(file) {
  if (!file) return;
  try {
    const blob = file.size > LARGEST ? await smaller(file) : file;
    const address = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(blob);
    });
    image = address.slice(address.indexOf(",") + 1);
    at("preview").src = address;
    at("name").textContent = file.name;
    at("chosen").hidden = false;
    ask();
  } catch (error) {
    say(`${file.name} cannot be read as an image`, true);
  }
}

async function smaller(file) {
  const whole = await createImageBitmap(file);
  const scale = Math.min(1, 1024 / Math.min(whole.width, whole.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(whole.width * scale);
  canvas.height = Math.round(whole.height * scale);
  canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

function forget() {
  image = null;
  at("file").value = "";
  at("chosen").hidden = true;
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("file").addEventListener("change", () => take(at("file").files[0]));
at("clear").addEventListener("click", forget);
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
