"use strict";
// What the page says, in both languages, and its switches for language and theme.

const words = JSON.parse(document.getElementById("words").textContent);
const byId = (id) => document.getElementById(id);
let language = (navigator.language || "en").startsWith("zh") ? "zh" : "en";

function say(word, facts = {}) {
  return words[language][word].replace(/\{(\w+)\}/g, (_, name) => facts[name]);
}

/** The name of a kind of cell; that of the zoo where the page has no other. */
const named = (kind) => words[language][kind] ?? kind;

/** Say all words of a part of the page. */
function sayAll(part = document) {
  for (const element of part.querySelectorAll("[data-word]")) element.textContent = say(element.dataset.word);
  for (const element of part.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(element.dataset.label));
}

function switchLanguage(to = language === "en" ? "zh" : "en") {
  language = to;
  document.documentElement.lang = to;
  document.title = say("title");
  sayAll();
}

function switchTheme() {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = shown === "dark" ? "light" : "dark";
}

/** An element of HTML without scripts of its own; texts from elsewhere are set by textContent. */
function element(html) {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content.firstElementChild;
}
