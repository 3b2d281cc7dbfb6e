"use strict";

// ---- units that stand out: the first eight of a value by a measure ----

const MOST_UNITS = 8;
let listed = "";

/** Measures of a unit's numbers over the steps. */
const MEASURES = {
  largestMean: (numbers) => mean(numbers),
  smallestMean: (numbers) => -mean(numbers),
  variesMost: (numbers) => deviation(numbers),
  variesLeast: (numbers) => -deviation(numbers),
  largest: (numbers) => numbers.reduce((most, number) => Math.max(most, number), -Infinity),
  smallest: (numbers) => -numbers.reduce((least, number) => Math.min(least, number), Infinity),
};

const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / (numbers.length || 1);

function deviation(numbers) {
  const middle = mean(numbers);
  return Math.sqrt(mean(numbers.map((number) => (number - middle) ** 2)));
}

/** The units of a value, first those of which a measure is largest, with the step at which each is largest. */
function ranked(value, measure) {
  const last = tape.lengths[page.row];
  const units = Array.from({ length: value.size }, (_, unit) => {
    const numbers = Array.from({ length: last }, (_, step) => vector(value, step)[unit]);
    const peak = numbers.reduce((best, number, step) => (Math.abs(number) > Math.abs(numbers[best]) ? step : best), 0);
    return { unit, peak, rank: MEASURES[measure](numbers.filter((number) => !Number.isNaN(number))) };
  });
  const comparable = ({ rank }) => (Number.isNaN(rank) ? -Infinity : rank);
  return units.sort((a, b) => (comparable(a) === comparable(b) ? a.unit - b.unit : comparable(b) > comparable(a) ? 1 : -1));
}

function drawUnits() {
  const track = tape.tracks[page.track], names = shown(track), choice = byId("unitsOf");
  const options = names.map(({ name, label }) => `${name} ${label}`).join();
  if (choice.dataset.options !== options) {
    const kept = choice.value;
    choice.dataset.options = options;
    choice.replaceChildren(...names.map(({ name, label }) => new Option(label, name)));
    if (names.some(({ name }) => name === kept)) choice.value = kept;
  }
  const key = [page.track, page.row, choice.value, byId("measure").value, page.language].join();
  if (listed !== key) {
    listed = key;
    const value = find(track, choice.value), sign = byId("measure").value.startsWith("smallest") || byId("measure").value === "variesLeast" ? -1 : 1;
    const buttons = ranked(value, byId("measure").value).slice(0, MOST_UNITS).map(({ unit, peak, rank }) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.unit = unit;
      button.textContent = `${unit}: ${format(sign * rank, value)}`;
      button.title = say("peak", { step: peak });
      button.onclick = () => go({ unit, step: peak });
      return button;
    });
    byId("units").replaceChildren(...buttons);
  }
  for (const button of byId("units").children) button.classList.toggle("chosen", Number(button.dataset.unit) === page.unit);
}

function startUnits() {
  sayMeasures();
  byId("unitsOf").addEventListener("change", drawUnits);
  byId("measure").addEventListener("change", drawUnits);
}

function sayMeasures() {
  const measure = byId("measure"), kept = measure.value || "variesMost";
  measure.replaceChildren(...Object.keys(MEASURES).map((name) => new Option(say(name), name)));
  measure.value = kept;
}
