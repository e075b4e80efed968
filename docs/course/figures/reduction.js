// The interactive figure of chapter 4: a sum over a warp by exclusive-or shuffles, then over a block of four warps.
(function () {
  "use strict";
  var WORDS = {
    en: {
      warp: "Warp", block: "Block of 4 warps", back: "Back", next: "Next", play: "Play", stop: "Stop", step: "step",
      start: "Each lane holds its own number.",
      shuffle: "offset {0}: lane l adds what lane l ^ {0} holds. {1} different values are left.",
      done: "All 32 lanes hold the sum, {0}.",
      b: ["Every warp has its partial sums, one for each lane (8 are drawn; each holds 1).",
        "warp_reduce: each warp has the sum of its 32 lanes, in all of them.",
        "Lane 0 of each warp writes the sum to scratch. Then __syncthreads(): all wait for all.",
        "Every warp reads scratch: lane i gets the sum of warp i; the other lanes get the neutral element, 0.",
        "warp_reduce again, in all warps at once: every thread of the block holds the sum, 128."],
      label: "Reduction, step by step. Left and right arrow keys change the step."
    },
    zh: {
      warp: "线程束", block: "四个线程束的块", back: "上一步", next: "下一步", play: "播放", stop: "停止", step: "步骤",
      start: "每个通道持有自己的编号。",
      shuffle: "偏移 {0}：通道 l 加上通道 l ^ {0} 持有的值。还剩 {1} 个不同的值。",
      done: "32 个通道都持有总和 {0}。",
      b: ["每个线程束的每个通道各有一个部分和（只画出 8 个通道，每个值为 1）。",
        "warp_reduce：每个线程束的所有通道都得到这 32 个通道之和。",
        "各线程束的通道 0 把和写入 scratch，然后 __syncthreads()：全体互相等待。",
        "每个线程束都读 scratch：通道 i 得到线程束 i 的和，其余通道得到单位元 0。",
        "所有线程束同时再做一次 warp_reduce：块内每个线程都持有总和 128。"],
      label: "逐步展示归约。左右方向键切换步骤。"
    }
  };
  var COLOURS = ["#4c8bf5", "#e8833a", "#3fa45b", "#9a66d0", "#d1495b", "#2a9d9d", "#b8912b", "#8a8f98"];
  var SVG = "http://www.w3.org/2000/svg";
  function colour(i) { return i < 8 ? COLOURS[i] : "hsl(" + (i * 137) % 360 + " 45% 55%)"; }
  function fill(text, values) { return text.replace(/\{(\d)\}/g, function (_, i) { return values[i]; }); }
  function draw(svg, name, attributes, text) {
    var node = document.createElementNS(SVG, name);
    for (var key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    svg.appendChild(node);
  }
  function cell(svg, x, y, w, h, value, hue) {
    draw(svg, "rect", { x: x, y: y, width: w - 2, height: h, rx: 3, fill: hue, "fill-opacity": 0.4, stroke: "currentColor", "stroke-opacity": 0.6 });
    draw(svg, "text", { x: x + w / 2 - 1, y: y + h / 2 + 4, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, value);
  }
  // What 32 lanes hold after a number of steps.
  function lanesAfter(steps) {
    var held = [], lane;
    for (lane = 0; lane < 32; lane++) held.push(lane);
    for (var step = 0, offset = 16; step < steps; step++, offset >>= 1) {
      held = held.map(function (value, lane) { return value + held[lane ^ offset]; });
    }
    return held;
  }
  function drawWarp(svg, step, words) {
    var held = lanesAfter(step), offset = 16 >> step, seen = [];
    held.forEach(function (value, lane) {
      if (seen.indexOf(value) < 0) seen.push(value);
      var x = 8 + (lane % 16) * 42, y = lane < 16 ? 60 : 190;
      cell(svg, x, y, 42, 34, value, colour(seen.indexOf(value)));
      draw(svg, "text", { x: x + 20, y: lane < 16 ? y - 6 : y + 50, "text-anchor": "middle", "font-size": 10, fill: "currentColor", opacity: 0.7 }, lane);
    });
    if (step < 5) {  // who exchanges with whom next
      for (var lane = 0; lane < 32; lane++) {
        var other = lane ^ offset;
        if (other < lane) continue;
        var x1 = 28 + (lane % 16) * 42, x2 = 28 + (other % 16) * 42, d;
        if (offset === 16) d = "M" + x1 + " 96V188";
        else if (lane < 16) d = "M" + x1 + " 96Q" + (x1 + x2) / 2 + " " + (104 + offset * 6) + " " + x2 + " 96";
        else d = "M" + x1 + " 188Q" + (x1 + x2) / 2 + " " + (180 - offset * 6) + " " + x2 + " 188";
        draw(svg, "path", { d: d, fill: "none", stroke: "currentColor", "stroke-opacity": 0.55, "stroke-width": 1.2 });
      }
    }
    if (step === 0) return words.start;
    return fill(words.shuffle, [32 >> step, seen.length]) + (step === 5 ? " " + fill(words.done, [held[0]]) : "");
  }
  function drawBlock(svg, step, words) {
    var hues = ["#4c8bf5", "#e8833a", "#3fa45b", "#9a66d0"];
    for (var warp = 0; warp < 4; warp++) {
      var y = 22 + warp * 52;
      draw(svg, "text", { x: 8, y: y + 22, "font-size": 12, fill: "currentColor" }, "warp " + warp);
      for (var lane = 0; lane < 8; lane++) {
        var value = step === 0 ? 1 : step < 3 ? 32 : step === 3 ? (lane < 4 ? 32 : 0) : 128;
        var hue = step < 3 ? hues[warp] : step === 3 ? (lane < 4 ? hues[lane] : "#8a8f98") : "#d1495b";
        cell(svg, 66 + lane * 42, y, 42, 34, value, hue);
      }
      draw(svg, "text", { x: 410, y: y + 22, "font-size": 12, fill: "currentColor" }, "…");
      if (step === 2) draw(svg, "path", { d: "M86 " + (y + 36) + "C200 " + (y + 60) + " 430 " + (y + 20) + " 528 " + (y + 17), fill: "none", stroke: hues[warp], "stroke-width": 2 });
      if (step === 3) draw(svg, "path", { d: "M528 " + (y + 17) + "C480 " + (y + 17) + " 460 119 425 119", fill: "none", stroke: hues[warp], "stroke-width": 2 });
      cell(svg, 530, y, 60, 34, step >= 2 ? 32 : "–", step >= 2 ? hues[warp] : "#8a8f98");
    }
    draw(svg, "text", { x: 560, y: 14, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, "scratch");
    if (step === 2) {
      draw(svg, "path", { d: "M440 22V212", stroke: "#d1495b", "stroke-width": 2, "stroke-dasharray": "6 4", fill: "none" });
      draw(svg, "text", { x: 440, y: 236, "text-anchor": "middle", "font-size": 12, fill: "currentColor" }, "__syncthreads()");
    }
    return words.b[step];
  }
  function build(host) {
    var words = WORDS[(document.documentElement.lang || "en").slice(0, 2)] || WORDS.en;
    var kinds = { warp: { draw: drawWarp, steps: 5 }, block: { draw: drawBlock, steps: 4 } };
    var kind = "warp", step = 0, timer = null;
    var svg = document.createElementNS(SVG, "svg"), said = document.createElement("p"), bar = document.createElement("div");
    svg.setAttribute("viewBox", "0 0 690 250");
    svg.setAttribute("aria-hidden", "true");
    svg.style.cssText = "width:100%;min-width:24rem;height:auto;font-family:system-ui,sans-serif";
    host.textContent = "";
    host.style.cssText = "border:1px solid currentColor;border-radius:6px;padding:.6rem;margin:1rem 0";
    host.tabIndex = 0;
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", words.label);
    said.setAttribute("aria-live", "polite");
    said.style.cssText = "margin:.3rem 0;min-height:3em";
    bar.style.cssText = "display:flex;flex-wrap:wrap;gap:.4rem;align-items:center";
    function button(label, press) {
      var made = document.createElement("button");
      made.type = "button";
      made.textContent = label;
      made.style.cssText = "font:inherit;font-size:.75rem;color:inherit;background:transparent;border:1px solid currentColor;border-radius:4px;padding:.15rem .6rem;cursor:pointer";
      made.addEventListener("click", press);
      bar.appendChild(made);
      return made;
    }
    function show() {
      svg.textContent = "";
      said.textContent = words.step + " " + step + "/" + kinds[kind].steps + ": " + kinds[kind].draw(svg, step, words);
      back.disabled = step === 0;
      next.disabled = step === kinds[kind].steps;
      back.style.opacity = back.disabled ? 0.4 : 1;
      next.style.opacity = next.disabled ? 0.4 : 1;
      ofWarp.setAttribute("aria-pressed", kind === "warp");
      ofBlock.setAttribute("aria-pressed", kind === "block");
      ofWarp.style.fontWeight = kind === "warp" ? "700" : "400";
      ofBlock.style.fontWeight = kind === "block" ? "700" : "400";
    }
    function go(by) { step = Math.max(0, Math.min(kinds[kind].steps, step + by)); show(); }
    function stop() { clearInterval(timer); timer = null; play.textContent = words.play; }
    function choose(name) { stop(); kind = name; step = 0; show(); }
    var ofWarp = button(words.warp, function () { choose("warp"); });
    var ofBlock = button(words.block, function () { choose("block"); });
    var back = button("◀ " + words.back, function () { stop(); go(-1); });
    var next = button(words.next + " ▶", function () { stop(); go(1); });
    var play = button(words.play, function () {
      if (timer) return stop();
      if (step === kinds[kind].steps) step = -1;
      play.textContent = words.stop;
      go(1);
      timer = setInterval(function () { if (step === kinds[kind].steps) stop(); else go(1); }, 1800);
    });
    host.addEventListener("keydown", function (event) {
      if (event.key === "ArrowRight") { stop(); go(1); event.preventDefault(); }
      if (event.key === "ArrowLeft") { stop(); go(-1); event.preventDefault(); }
    });
    host.appendChild(bar);
    var view = document.createElement("div");
    view.style.overflowX = "auto";
    view.appendChild(svg);
    host.appendChild(view);
    host.appendChild(said);
    show();
  }
  Array.prototype.forEach.call(document.querySelectorAll(".reduction-figure"), build);
})();
