// A reply as safe HTML. What a model writes is never trusted: everything passes DOMPurify, and nothing is loaded.
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import c from "highlight.js/lib/languages/c";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import { Marked } from "marked";

const languages = { bash, c, cpp, css, go, java, javascript, json, python, rust, sql, typescript, xml, yaml };
for (const [name, language] of Object.entries(languages)) hljs.registerLanguage(name, language);

const escaped = (text) => text.replace(/[&<>"]/g, (found) => `&#${found.charCodeAt(0)};`);
const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    code({ text, lang }) {
      const language = hljs.getLanguage(lang ?? "") ? lang : null;
      const body = language ? hljs.highlight(text, { language }).value : escaped(text);
      return `<pre tabindex="0"><code class="hljs">${body}\n</code></pre>`;
    },
    html: ({ text }) => escaped(text), // what looks like HTML was meant as text
    image: ({ text, href }) => escaped(`[${text || "image"}: ${href}]`),
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

export const html = (text) =>
  DOMPurify.sanitize(marked.parse(text), { FORBID_TAGS: ["style", "form", "img", "svg", "math"], FORBID_ATTR: ["style", "id"], ADD_ATTR: ["tabindex"] });
