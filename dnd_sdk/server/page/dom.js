/**
 * Elements. Text enters the page as text nodes and attributes only: no file of the page reads HTML.
 */

/** The element with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element. Attributes: a function is a listener ("onclick"), true and false mean present and absent.
 * Children: nodes, texts, numbers and lists of them; null and false are left out.
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...present(children));
  return node;
}

/** Put these children into a node, in place of those it has. */
export function fill(node, ...children) {
  node.replaceChildren(...present(children));
}

/** Change a node's text only if it differs: a selection in it stays, and a screen reader hears no repetition. */
export function setText(node, text) {
  const wanted = String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/** Keep a list of items on screen: what stays keeps its element, and with it focus, selection and what is unfolded. */
export class KeyedList {
  /** `create()` gives `{node, update(item)}`; `keyOf(item)` tells items apart. */
  constructor(parent, keyOf, create) {
    Object.assign(this, { parent, keyOf, create, rows: new Map() });
  }

  show(items) {
    const rows = new Map();
    for (const item of items) {
      const key = this.keyOf(item);
      const row = this.rows.get(key) ?? this.create();
      row.update(item);
      rows.set(key, row);
    }
    for (const [key, row] of this.rows) if (!rows.has(key)) row.node.remove();
    let next = this.parent.firstChild;
    for (const { node } of rows.values()) {
      if (node === next) next = next.nextSibling;
      else this.parent.insertBefore(node, next);
    }
    this.rows = rows;
  }
}

function present(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}
