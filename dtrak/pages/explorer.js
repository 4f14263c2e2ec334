"use strict";
// Lets a reader explore the scores in the page: `explorer.py` says what the data are.
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const { queries, train, groups } = data;
  const M = queries.ids.length;
  const N = train.ids.length;
  // of the pictures in the page, and of the rows and training images shown at a time
  const [numQueryPictures, numTrainPictures] = data.pictures;
  const PAGE = 16;
  const GRID = 48;
  const SIDES = [
    ["proponents", "Proponents", "presence lowered the error", 1],
    ["opponents", "Opponents", "presence raised the error", -1],
  ];

  function bytes(text) {
    const raw = atob(text);
    const found = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
    return found;
  }

  function halves(text) {
    if (text === null) return null;
    const words = new Uint16Array(bytes(text).buffer);
    return Float32Array.from(words, (word) => {
      const exponent = (word >> 10) & 31;
      const fraction = word & 1023;
      const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
      return word >> 15 ? -size : size;
    });
  }

  const scores = new Float32Array(bytes(data.scores).buffer);
  const relative = halves(data.errors);
  const chances = halves(data.p);
  const bits = data.out === null ? null : bytes(data.out);
  const strongest = Array.from({ length: M }, (_, m) => {
    let most = 0;
    for (let k = 0; k < N; k++) most = Math.max(most, Math.abs(scores[m * N + k]));
    return most || 1;
  });
  const score = (m, k) => scores[m * N + k];
  const error = (m, k) => (relative === null ? null : relative[m * N + k] * strongest[m]);
  const chance = (m, k) => (chances === null ? null : chances[m * N + k]);
  const standsOut = (m, k) => bits !== null && ((bits[(m * N + k) >> 3] >> ((m * N + k) & 7)) & 1) > 0;
  const label = (k) => (train.labels === null ? "" : data.classes[train.labels[k]]);

  const orders = [];
  // places of the training images of a query, the highest score first
  function order(m) {
    if (orders[m] === undefined) {
      const row = scores.subarray(m * N, (m + 1) * N);
      orders[m] = Array.from(row.keys()).sort((a, b) => row[b] - row[a] || a - b);
    }
    return orders[m];
  }

  // ranks of a query's training images, from 1; none where the page does not know
  function ranks(m) {
    const found = new Array(N).fill(null);
    const depth = data.depth === null ? N : data.depth;
    order(m).forEach((k, place) => {
      if (place < depth) found[k] = place + 1;
      else if (N - place <= depth) found[k] = data.total - (N - place) + 1;
    });
    return found;
  }

  // ---- making elements

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }

  const drawing = make("div");
  drawing.innerHTML = "<svg></svg>";
  const { namespaceURI } = drawing.firstChild;
  function draw(tag, attributes, ...children) {
    const element = document.createElementNS(namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function picture(letter, number, name) {
    const count = letter === "q" ? numQueryPictures : numTrainPictures;
    if (number < count) {
      return make("span", { class: `im ${letter} ${letter}${number}`, role: "img", "aria-label": name });
    }
    return make("span", { class: `im ${letter} absent`, role: "img", "aria-label": name }, "not in this page");
  }

  function digits(value, count = 3) {
    const scaled = value / 10 ** data.exponent;
    return scaled === 0 ? "0" : scaled.toPrecision(count);
  }
  const signed = (value) => (value < 0 ? "−" : "+") + digits(Math.abs(value));
  const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;
  const small = (text) => (text ? make("small", { class: "soft" }, text) : null);
  const quote = (captions, i) => (captions === null ? null : captions[i] ? `“${captions[i]}”` : "no caption");
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // a name whose telling end is not cut off where room is short, as `html.render_name`
  function shownName(name) {
    const cut = Math.max(name.lastIndexOf("/"), name.length - 10, 0);
    const parts = [name.slice(0, cut), name.slice(cut)].filter((part) => part);
    return make("span", { class: "name", title: name }, ...parts.map((part) => make("span", {}, part)));
  }

  function bar(m, k) {
    const value = score(m, k);
    const found = make("span", { class: `bar ${value < 0 ? "minus" : "plus"}` }, make("i"));
    const share = (size) => `${Math.min(100, Math.max(0, (100 * size) / strongest[m]))}%`;
    found.firstChild.style.width = share(Math.abs(value));
    if (relative !== null) {
      const noise = 2 * error(m, k);
      const whisker = make("s", { title: `two standard errors: ±${digits(noise, 2)}` });
      whisker.style.left = share(Math.abs(value) - noise);
      whisker.style.right = `calc(100% - ${share(Math.abs(value) + noise)})`;
      found.append(whisker);
    }
    return found;
  }

  function figures(m, k) {
    const value = score(m, k);
    const found = [make("data", { class: value < 0 ? "minus" : "plus", value }, signed(value))];
    if (relative !== null) found.push(small(`±${digits(2 * error(m, k), 2)}`));
    const p = chance(m, k);
    if (p !== null) found.push(small(p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(3)}`));
    if (standsOut(m, k)) found.push(make("b", { class: "out" }, "stands out"));
    return found;
  }

  function match(m, k, all) {
    const name = train.ids[k];
    const open = () => showTrain(k, all);
    return make("li", {}, make("figure", {},
      make("button", { class: "pick", type: "button", onclick: open },
        picture("t", k, `training image ${name}, score ${signed(score(m, k))}`)),
      make("figcaption", {}, bar(m, k), ...figures(m, k), shownName(name),
        small(quote(train.captions, k)),
        label(k) ? make("span", { class: "soft" }, label(k)) : null)));
  }

  // ---- what is chosen

  const tools = find("tools");
  const chosen = (name) => (tools.elements[name] ? tools.elements[name].value : "");
  let open = [];

  // training images that fit the words, the label and the group
  function updateOpen() {
    const words = chosen("text").toLowerCase().split(/\s+/).filter((word) => word);
    const [wanted, group] = [chosen("label"), chosen("group")];
    open = train.ids.map((name, k) => {
      if (wanted !== "" && train.labels[k] !== Number(wanted)) return false;
      if (group !== "" && groups.members[k] !== Number(group)) return false;
      const caption = train.captions === null ? "" : train.captions[k];
      const text = `${name} ${label(k)} ${caption}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }

  function isSure(m, k) {
    const how = chosen("sure");
    if (how === "errors") return Math.abs(score(m, k)) > 2 * error(m, k);
    if (how === "p") return chance(m, k) <= 0.05;
    return how !== "out" || standsOut(m, k);
  }

  // the first training images on a side of a query, and whether there are more in the page
  function matches(m, sign, count) {
    const found = [];
    const [all, depth] = [order(m), data.depth === null ? N : data.depth];
    for (let i = 0; i < depth; i++) {
      const k = sign > 0 ? all[i] : all[N - 1 - i];
      if (!(sign * score(m, k) > 0)) break;
      if (!open[k] || !isSure(m, k)) continue;
      if (found.length === count) return [found, true];
      found.push(k);
    }
    return [found, false];
  }

  // share of the positive scores of a query that its first five have
  const concentrations = [];
  function concentration(m) {
    if (concentrations[m] === undefined) {
      const row = order(m).map((k) => Math.max(0, score(m, k)));
      const sum = (values) => values.reduce((a, b) => a + b, 0);
      concentrations[m] = sum(row.slice(0, 5)) / (sum(row) || 1);
    }
    return concentrations[m];
  }

  function countOut(m) {
    let found = 0;
    for (let k = 0; k < N; k++) found += standsOut(m, k);
    return found;
  }

  function chosenQueries() {
    const words = chosen("query").toLowerCase().split(/\s+/).filter((word) => word);
    const found = queries.ids.map((_, m) => m).filter((m) => {
      const parts = [queries.ids, queries.captions, queries.labels].map((texts) => (texts ? texts[m] : ""));
      return words.every((word) => parts.join(" ").toLowerCase().includes(word));
    });
    const by = chosen("sort");
    if (by === "name") found.sort((a, b) => queries.ids[a].localeCompare(queries.ids[b], "en", { numeric: true }));
    if (by === "concentration") found.sort((a, b) => concentration(b) - concentration(a) || a - b);
    if (by === "out") {
      const counts = found.reduce((all, m) => all.set(m, countOut(m)), new Map());
      found.sort((a, b) => counts.get(b) - counts.get(a) || a - b);
    }
    return found;
  }

  // ---- rows of queries

  const more = new Map();

  function row(m) {
    const name = queries.ids[m];
    const section = make("section", { class: "query", "data-query": m },
      make("div", { class: "subject" },
        make("button", { class: "pick", type: "button", onclick: () => showQuery(m) },
          picture("q", m, `${data.kind} ${name}`)),
        make("div", {}, make("h2", { title: name }, name),
          small(quote(queries.captions, m)),
          queries.labels ? small(queries.labels[m]) : null)));
    for (const [kind, heading, meaning, sign] of SIDES) {
      const key = `${m} ${kind}`;
      const wanted = Number(chosen("count"));
      // of opponents a few, as without the script, until more are asked for
      const few = wanted === data.shown ? 3 : Math.max(3, Math.round(0.6 * wanted));
      const usual = kind === "proponents" ? wanted : few;
      const [found, hasMore] = matches(m, sign, usual + (more.get(key) || 0));
      const add = () => {
        more.set(key, (more.get(key) || 0) + 10);
        const anew = row(m);
        section.replaceWith(anew);
        const next = anew.querySelector(`.${kind} .pick`) && anew.querySelectorAll(`.${kind} .pick`)[found.length];
        if (next) next.focus();
      };
      section.append(make("div", { class: `side ${kind}` },
        make("h3", {}, `${heading} `, make("span", {}, meaning)),
        make("ol", { class: "strip" },
          ...(found.length ? found.map((k) => match(m, k, found)) : [make("li", { class: "soft" }, "none")])),
        hasMore ? make("button", { class: "more", type: "button", onclick: add }, `More ${kind}`) : null));
    }
    const below = make("div", { class: "below" });
    if (queries.verdicts) below.append(make("p", { class: "verdict" }, queries.verdicts[m]));
    if (data.alike) below.append(alike(m));
    const details = make("details", {}, make("summary", {}, "All scores of this picture"));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(summary(m));
    });
    below.append(details);
    section.append(below);
    return section;
  }

  // the nearest images, and how many of them are among as many proponents
  function alike(m) {
    const all = data.alike.places[m];
    const known = all.filter((k) => k >= 0);
    const first = new Set(matchesWhatever(m, all.length));
    const both = known.filter((k) => first.has(k)).length;
    return make("div", { class: "alike" },
      make("h3", {}, "Looks alike ", make("span", {},
        `nearest by ${data.alike.by}; ${both} of ${all.length} are among the first ${all.length} proponents`)),
      make("ol", { class: "strip" }, ...known.map((k) => match(m, k, known))));
  }

  const matchesWhatever = (m, count) => order(m).slice(0, count).filter((k) => score(m, k) > 0);

  function summary(m) {
    const parts = [histogram(m)];
    if (data.totals) {
      const { classes, sizes, shares } = data.totals;
      parts.push(totals("Classes", classes.map((c) => data.classes[c]), sizes, shares[m], null, null));
    }
    if (groups) {
      const errors = groups.errors && groups.errors[m];
      parts.push(totals("Groups", groups.names, groups.sizes, groups.shares[m], groups.scores[m], errors));
    }
    return make("div", { class: "summary" }, ...parts);
  }

  function histogram(m) {
    const { low, high, counts, noise } = data.histograms[m];
    const [width, height] = [600, 150];
    const x = (value) => ((value - low) / (high - low || 1)) * width;
    const tallest = Math.log1p(Math.max(1, ...counts));
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height + 24}`, class: "plot", role: "img",
      "aria-label": `Histogram of the scores of ${queries.ids[m]}, from ${signed(low)} to ${signed(high)}` });
    if (noise !== null) {
      const [left, right] = [Math.max(0, x(-2 * noise)), Math.min(width, x(2 * noise))];
      svg.append(draw("rect", { class: "band", x: left, y: 0, width: Math.max(0, right - left), height }));
    }
    counts.forEach((count, i) => {
      const tall = (Math.log1p(count) / tallest) * (height - 4);
      const middle = low + ((i + 0.5) * (high - low)) / counts.length;
      svg.append(draw("rect", { class: middle < 0 ? "minus" : "plus", x: (i * width) / counts.length + 0.5,
        y: height - tall, width: width / counts.length - 1, height: tall }));
    });
    svg.append(draw("line", { x1: x(0), x2: x(0), y1: 0, y2: height }));
    for (const [value, anchor] of [[low, "start"], [0, "middle"], [high, "end"]]) {
      const away = Math.min(x(value), width - x(value)) > 60;
      if (value !== 0 || away) {
        svg.append(draw("text", { x: x(value), y: height + 18, "text-anchor": anchor },
          value === 0 ? "0" : signed(value)));
      }
    }
    const band = noise === null ? "" : " Shaded: two standard errors (root mean square) to each side of 0, where noise alone puts most scores.";
    return make("figure", { class: "histogram" }, svg,
      make("figcaption", { class: "soft" }, `Scores of all ${plural(data.total, "training image")}; height: logarithm of how many.${band}`));
  }

  function totals(title, names, sizes, shares, sums, errors) {
    const best = names.map((_, g) => g).sort((a, b) => shares[b] - shares[a] || a - b).slice(0, 12);
    const rows = best.filter((g) => shares[g] > 0).map((g) => {
      const filled = make("i");
      filled.style.width = percent(shares[g] / shares[best[0]]).replace(" ", "");
      const spread = errors ? ` ±${digits(2 * errors[g], 2)}` : "";
      return make("tr", {}, make("th", { scope: "row" }, names[g]),
        make("td", { class: "number" }, plural(sizes[g], "image")),
        make("td", { class: "number" }, percent(shares[g])),
        sums ? make("td", { class: "number" }, signed(sums[g]) + spread) : null,
        make("td", { class: "wide" }, make("span", { class: "bar plus" }, filled)));
    });
    return make("div", { class: "totals" },
      make("h3", {}, `${title} `, make("span", {}, "share of the positive scores")),
      make("table", {}, make("tbody", {}, ...rows)));
  }

  // ---- training images

  let serves = null;
  let shares = null;
  function weigh() {
    if (serves !== null) return;
    serves = new Array(N).fill(0);
    shares = new Array(N).fill(0);
    for (let m = 0; m < M; m++) {
      let mass = 0;
      for (let k = 0; k < N; k++) mass += Math.max(0, score(m, k));
      for (let k = 0; k < N; k++) shares[k] += Math.max(0, score(m, k)) / (mass || 1) / M;
      for (const k of matchesWhatever(m, data.shown)) serves[k] += 1;
    }
  }

  function chosenTrain() {
    weigh();
    const how = chosen("sure");
    const isAny = (k) => how === "" || queries.ids.some((_, m) => score(m, k) > 0 && isSure(m, k));
    const found = train.ids.map((_, k) => k).filter((k) => open[k] && isAny(k));
    const by = find("order").value;
    if (by === "name") found.sort((a, b) => train.ids[a].localeCompare(train.ids[b], "en", { numeric: true }));
    else if (by === "serves") found.sort((a, b) => serves[b] - serves[a] || shares[b] - shares[a] || a - b);
    else found.sort((a, b) => shares[b] - shares[a] || a - b);
    return found;
  }

  function tile(k, all) {
    return make("li", {}, make("figure", {},
      make("button", { class: "pick", type: "button", onclick: () => showTrain(k, all) },
        picture("t", k, `training image ${train.ids[k]}`)),
      make("figcaption", {},
        make("b", {}, percent(shares[k])),
        small(serves[k] ? `in the first ${data.shown} of ${plural(serves[k], "picture")}` : null),
        shownName(train.ids[k]),
        label(k) ? make("span", { class: "soft" }, label(k)) : null)));
  }

  // ---- one picture, large

  const dialog = make("dialog", { id: "zoom", "aria-labelledby": "zoom-name" });
  document.body.append(dialog);
  let step = () => {};

  function present(name, image, below, position, total, go) {
    const move = (by) => () => go((position + by + total) % total);
    step = total > 1 ? (by) => move(by)() : () => {};
    const closing = make("button", { type: "button", onclick: () => dialog.close() }, "Close");
    const head = make("div", { class: "head" }, make("h2", { id: "zoom-name" }, name),
      total > 1 ? make("button", { type: "button", onclick: move(-1), "aria-label": "Previous" }, "←") : null,
      total > 1 ? make("button", { type: "button", onclick: move(1), "aria-label": "Next" }, "→") : null,
      closing);
    dialog.replaceChildren(head, make("div", { class: "large" }, image), ...below);
    if (!dialog.open) dialog.showModal();
    closing.focus();
    dialog.scrollTop = 0;
  }

  function showQuery(m) {
    const all = chosenQueries();
    const below = [small(quote(queries.captions, m)), queries.verdicts ? make("p", {}, queries.verdicts[m]) : null, summary(m)];
    present(queries.ids[m], picture("q", m, `${data.kind} ${queries.ids[m]}`), below.filter((e) => e),
      all.indexOf(m), all.length, (i) => showQuery(all[i]));
  }

  function showTrain(k, all) {
    const rows = queries.ids.map((_, m) => m).sort((a, b) => score(b, k) / strongest[b] - score(a, k) / strongest[a] || a - b);
    const item = (m) => {
      const rank = ranks(m)[k];
      const words = rank === null ? `beyond the first ${data.depth}` : `number ${rank.toLocaleString("en")} of ${data.total.toLocaleString("en")}`;
      return make("li", {}, make("figure", {},
        make("button", { class: "pick", type: "button", onclick: () => showQuery(m) },
          picture("q", m, `${data.kind} ${queries.ids[m]}, score ${signed(score(m, k))}`)),
        make("figcaption", {}, bar(m, k), ...figures(m, k), small(words), shownName(queries.ids[m]))));
    };
    const sides = [["Serves these pictures", rows.filter((m) => score(m, k) > 0)],
      ["Speaks against these", rows.filter((m) => score(m, k) < 0).reverse()]];
    const below = [make("p", { class: "soft" }, [label(k), quote(train.captions, k)].filter((t) => t).join(", "))];
    for (const [heading, found] of sides) {
      if (found.length) {
        below.push(make("h3", {}, `${heading} `, make("span", {}, "score against the strongest of each picture")),
          make("ol", { class: "strip" }, ...found.slice(0, 24).map(item)));
      }
    }
    present(train.ids[k], picture("t", k, `training image ${train.ids[k]}`), below,
      Math.max(0, all.indexOf(k)), all.length, (i) => showTrain(all[i], all));
  }

  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("click", (event) => {
    // beside it
    if (event.target === dialog) dialog.close();
  });

  // ---- the table of what is chosen, as a file

  function quoted(value) {
    const text = String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function makeCsv() {
    const heads = ["query", "rank", "training image", "label", "score"];
    if (relative !== null) heads.push("standard error");
    if (chances !== null) heads.push("p value");
    if (bits !== null) heads.push("stands out");
    const lines = [heads.join(",")];
    for (const m of chosenQueries()) {
      const known = ranks(m);
      for (const k of order(m)) {
        if (!open[k] || !isSure(m, k)) continue;
        const cells = [queries.ids[m], known[k] === null ? "" : known[k], train.ids[k], label(k), Number(score(m, k).toPrecision(9))];
        if (relative !== null) cells.push(Number(error(m, k).toPrecision(3)));
        if (chances !== null) cells.push(Number(chance(m, k).toPrecision(3)));
        if (bits !== null) cells.push(standsOut(m, k) ? 1 : 0);
        lines.push(cells.map(quoted).join(","));
      }
    }
    return `${lines.join("\r\n")}\r\n`;
  }

  function exportCsv() {
    const address = URL.createObjectURL(new Blob([makeCsv()], { type: "text/csv" }));
    make("a", { href: address, download: "scores.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  }

  // ---- all of it

  let [numRows, numTiles] = [PAGE, GRID];

  function showRows() {
    const all = chosenQueries();
    const rows = all.slice(0, numRows).map(row);
    if (all.length > numRows) {
      const add = () => {
        numRows += PAGE;
        showRows();
      };
      rows.push(make("button", { class: "more", type: "button", onclick: add }, `Show more of ${plural(all.length, "picture")}`));
    }
    find("rows").replaceChildren(...rows);
    return all.length;
  }

  function showTiles() {
    const all = chosenTrain();
    find("tiles").replaceChildren(...all.slice(0, numTiles).map((k) => tile(k, all)));
    const add = () => {
      numTiles += GRID;
      showTiles();
    };
    const next = make("button", { class: "more", type: "button", onclick: add }, `Show more of ${plural(all.length, "training image")}`);
    find("tiles-more").replaceChildren(...(all.length > numTiles ? [next] : []));
    return all.length;
  }

  function show() {
    updateOpen();
    const counts = [plural(showRows(), "picture"), plural(showTiles(), "training image")];
    find("found").textContent = counts.join(", ");
  }

  const restart = () => {
    more.clear();
    [numRows, numTiles] = [PAGE, GRID];
    show();
  };

  // options that there is something behind
  function offer(name, options) {
    const select = tools.elements[name];
    const isUsual = (value) => name === "count" && value === data.shown;
    select.append(...options.map(([value, text]) => make("option", { value, selected: isUsual(value) }, text)));
    select.closest("label").hidden = select.options.length < 2;
  }
  offer("label", data.classes.length > 1 ? data.classes.map((name, c) => [c, name]) : []);
  offer("group", groups && groups.members ? groups.names.map((name, g) => [g, name]) : []);
  offer("sure", [
    ...(relative ? [["errors", "above two standard errors"]] : []),
    ...(chances ? [["p", "p at most 0.05"]] : []),
    ...(bits ? [["out", "what stands out"]] : []),
  ]);
  offer("sort", bits ? [["out", "what stands out"]] : []);
  const counts = [...new Set([data.shown, 5, 10, 20, 50])].sort((a, b) => a - b);
  offer("count", counts.map((count) => [count, count]));

  let waiting;
  tools.addEventListener("input", (event) => {
    if (event.target.name === "size") {
      document.documentElement.style.setProperty("--cell", `${event.target.value}px`);
      return;
    }
    clearTimeout(waiting);
    waiting = setTimeout(restart, event.target.type === "search" ? 150 : 0);
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.addEventListener("reset", () => setTimeout(() => {
    document.documentElement.style.removeProperty("--cell");
    restart();
  }));
  find("export").addEventListener("click", exportCsv);
  find("order").addEventListener("change", showTiles);
  for (const element of document.querySelectorAll("[data-scripted]")) element.hidden = false;
  show();
})();
