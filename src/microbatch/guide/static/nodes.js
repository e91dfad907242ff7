// A picture as a tree of plain records: written as text for a page, or laid over a picture that stands, of which only
// what differs is set. So a moving picture keeps its nodes.

import { escaped, round } from "./svg.js";

const SPACE = "http://www.w3.org/2000/svg";

export const node = (name, attributes = {}, ...children) => ({
  name,
  attributes: Object.entries(attributes).filter(([, value]) => value !== undefined && value !== null)
    .map(([key, value]) => [key, String(typeof value === "number" ? round(value) : value)]),
  children: children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
});

export function written(tree) {
  if (typeof tree === "string") return escaped(tree);
  const { name, attributes, children } = tree;
  if (attributes.some(([key, value]) => value === "0" && (key === "opacity" || (name === "rect" && ["width", "height"].includes(key))))) return ""; // nothing is seen of it
  const inside = children.map(written).join("");
  const begun = `<${name}${attributes.map(([key, value]) => ` ${key}="${escaped(value)}"`).join("")}`;
  return inside ? `${begun}>${inside}</${name}>` : name === "g" ? "" : `${begun}/>`;
}

function made(tree) {
  if (typeof tree === "string") return document.createTextNode(tree);
  const element = document.createElementNS(SPACE, tree.name);
  for (const [key, value] of tree.attributes) element.setAttribute(key, value);
  element.append(...tree.children.map(made));
  return element;
}

// Lay a tree over what was drawn from the tree before it.
export function lay(element, tree, before) {
  if (typeof tree === "string") {
    if (tree !== before) element.data = tree;
    return element;
  }
  if (!before || before.name !== tree.name || before.children.length !== tree.children.length) {
    const fresh = made(tree);
    element.replaceWith(fresh);
    return fresh;
  }
  const was = new Map(before.attributes);
  for (const [key, value] of tree.attributes) {
    if (was.get(key) !== value) element.setAttribute(key, value);
    was.delete(key);
  }
  for (const key of was.keys()) element.removeAttribute(key);
  tree.children.forEach((child, index) => lay(element.childNodes[index], child, before.children[index]));
  return element;
}
