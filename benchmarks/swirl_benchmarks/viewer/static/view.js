// Keys, and filters that apply when they change. Everything also works by links and buttons.
"use strict";

const help = document.getElementById("help");
const links = [...document.querySelectorAll(".rows .question a")];

function follow(selector) {
  document.querySelector(selector)?.click();
}

// The list: j and k mark the next and previous row, and go on to the next and previous page.
function mark(step) {
  const now = links.indexOf(document.activeElement);
  const next = links[now < 0 ? (step > 0 ? 0 : links.length - 1) : now + step];
  if (next) {
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  } else {
    follow(step > 0 ? ".pages [rel=next]" : ".pages [rel=prev]");
  }
}

const inList = {
  j: () => mark(1),
  k: () => mark(-1),
  "/": () => document.getElementById("q").focus(),
  c: () => {
    const link = links.includes(document.activeElement) ? document.activeElement : links[0];
    if (link) location.href = link.href.replace("/show?", "/compare?");
  },
  Escape: () => document.activeElement.blur(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const act = document.body.classList.contains("list") && inList[event.key];
  const link = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (act || link) {
    event.preventDefault();
    act ? act() : link.click();
  }
});

document.getElementById("help-button").addEventListener("click", () => help.showModal());

for (const form of document.querySelectorAll("form.filters, form.pick")) {
  form.addEventListener("submit", () => {
    for (const field of form.elements) if (field.name && !field.value) field.disabled = true; // short addresses
  });
  form.addEventListener("change", (event) => {
    if (event.target.type !== "search") form.requestSubmit();
  });
}
addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("form :disabled")) field.disabled = false;
});

if (location.hash === "#q") document.getElementById("q")?.focus();
