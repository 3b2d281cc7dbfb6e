// Equations: what the Markdown extension has marked, set by KaTeX from this site's own files.
const set = () => renderMathInElement(document.body, {
  delimiters: [
    { left: "\\(", right: "\\)", display: false },
    { left: "\\[", right: "\\]", display: true },
  ],
});
document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", set) : set();
