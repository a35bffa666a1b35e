"use strict";
(function () {
  document.querySelectorAll("[data-needs-script]").forEach(function (element) { element.hidden = false; });

  document.querySelectorAll("button[data-copies]").forEach(function (button) {
    var command = document.getElementById(button.dataset.copies);
    var said = button.previousElementSibling;
    function done() { said.textContent = "Copied."; }
    function byHand() {
      getSelection().selectAllChildren(command);
      said.textContent = document.execCommand("copy") ? "Copied." : "Selected: press Ctrl+C or ⌘C.";
    }
    button.addEventListener("click", function () {
      if (navigator.clipboard) { navigator.clipboard.writeText(command.textContent).then(done, byHand); }
      else { byHand(); }
    });
  });

  function get(name) { return document.getElementById("filter-" + name); }
  var kind = get("kind"), language = get("language"), mark = get("mark"), search = get("search");
  var pairs = Array.prototype.map.call(document.querySelectorAll(".prompt"), function (element) {
    return {
      element: element,
      text: element.textContent.toLowerCase(),
      marks: element.dataset.marks.split(" ")
    };
  });
  function filter() {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    var shown = 0;
    pairs.forEach(function (pair) {
      var data = pair.element.dataset;
      var fits = (!kind.value || data.kind === kind.value) &&
        (!language.value || data.language === language.value) &&
        (!mark.value || pair.marks.indexOf(mark.value) >= 0) &&
        words.every(function (one) { return pair.text.indexOf(one) >= 0; });
      pair.element.hidden = !fits;
      shown += fits ? 1 : 0;
    });
    get("count").textContent = shown + " of " + pairs.length + " shown";
    get("none").hidden = shown > 0;
  }
  [kind, language, mark, search].forEach(function (control) { control.addEventListener("input", filter); });
  document.getElementById("filters").addEventListener("submit", function (event) { event.preventDefault(); });
  document.getElementById("filters").addEventListener("reset", function () { setTimeout(filter); });
  filter(); // a reloaded page keeps what was typed
})();
