'use strict'
// The data: names of the models; facts about them; groups to colour by; for each method a map, neighbours and a tree.
// Names come from files of others: they reach the page as text (`textContent`), never as markup.
const data = JSON.parse(document.getElementById('data').textContent)
const state = {method: 0, colour: 0, chosen: null, group: null}
const LISTED = 8  // models listed under the search box
const SHAPES = {  // paths in a square from -1 to 1, as plotly draws the symbols of these names
  'circle': 'M1,0A1,1 0 1,1 -1,0A1,1 0 1,1 1,0Z',
  'square': 'M-.85,-.85H.85V.85H-.85Z',
  'diamond': 'M0,-1.2L1.2,0L0,1.2L-1.2,0Z',
  'triangle-up': 'M0,-1L1.1,.85H-1.1Z',
  'triangle-down': 'M0,1L1.1,-.85H-1.1Z',
  'cross': 'M-.35,-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z',
  'x': 'M-1,-.55L-.55,-1L0,-.45L.55,-1L1,-.55L.45,0L1,.55L.55,1L0,.45L-.55,1L-1,.55L-.45,0Z',
  'star': 'M0,-1.2L.3,-.4L1.15,-.37L.48,.15L.7,.97L0,.5L-.7,.97L-.48,.15L-1.15,-.37L-.3,-.4Z',
}
const byId = id => document.getElementById(id)
const method = () => data.methods[state.method]
const colour = () => data.colours[state.colour]
const groupOf = i => colour().groups[colour().codes[i]]
const fact = (column, i) => column.values[column.codes[i]]
const inkOf = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()
const count = (n, thing) => `${n.toLocaleString('en')} ${thing}${n === 1 ? '' : 's'}`

function element(tag, text, className) {
  const made = document.createElement(tag)
  if (text !== undefined) made.textContent = text
  if (className) made.className = className
  return made
}

function drawn(tag, attributes) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  return made
}

function glyph({colour, symbol}) {
  const svg = drawn('svg', {viewBox: '-1.2 -1.2 2.4 2.4', 'aria-hidden': 'true'})
  svg.append(drawn('path', {d: SHAPES[symbol], fill: colour}))
  return svg
}

// ---- The map: plotly draws the models

// plotly reads a little markup in its texts: what has a meaning there is written as a character's number
const plain = text => text.replace(/[&<>]/g, c => `&#${c.charCodeAt(0)};`)

function hoverText(name, i) {
  const lines = [`<b>${plain(name)}</b>`]
  for (const column of data.facts) if (fact(column, i)) lines.push(`${plain(column.label)}: ${plain(fact(column, i))}`)
  return lines.slice(0, 9).join('<br>')
}

function themed(layout) {
  const modebar = {bgcolor: 'transparent', color: inkOf('--soft'), activecolor: inkOf('--ink')}
  const hoverlabel = {bgcolor: inkOf('--page'), bordercolor: inkOf('--soft'), font: {...layout.font, color: inkOf('--ink')}}
  const colours = {paper_bgcolor: inkOf('--page'), plot_bgcolor: inkOf('--page'), modebar, hoverlabel}
  return {...layout, ...colours, font: {...layout.font, color: inkOf('--ink')}}
}

async function drawMap() {
  const {data: [models], layout} = structuredClone(data.map), marks = data.names.map((_, i) => groupOf(i))
  Object.assign(models, {x: method().x, y: method().y, text: data.hover, selectedpoints: lit()})
  models.marker.color = marks.map(mark => mark.colour)
  models.marker.symbol = marks.map(mark => mark.symbol)
  models.marker.size = data.sizes
  models.marker.line.color = inkOf('--page')
  if (matchMedia('(pointer: coarse)').matches) layout.dragmode = false  // a finger on the map scrolls the page
  byId('how').textContent = method().how
  byId('map').setAttribute('aria-label', `Map of ${count(data.names.length, 'model')}, compared by ${method().label}`)
  await Plotly.react('map', [models], themed(layout), data.config)
  if (!document.querySelector('#map .no-webgl')) return
  data.map.data[0].type = 'scatter'  // the browser has no WebGL
  Plotly.purge('map')
  await drawMap()
}

// The models that stand out: those of a group, or those that are searched for; null: all
function lit() {
  if (byId('search').value.trim()) return matches()
  if (state.group === null) return null
  return data.names.map((_, i) => i).filter(i => colour().codes[i] === state.group)
}

function light() { return Plotly.restyle('map', {selectedpoints: [lit()]}) }

// ---- Above the map: the chosen model, its neighbours, names of groups. They move without drawing the models again

function middle(numbers) { return numbers.sort((a, b) => a - b)[Math.floor(numbers.length/2)] }

// Where a model is on the screen, in pixels; `ranges` are those of the axes while they are dragged
function screen(ranges) {
  const {clientWidth, clientHeight, layout} = byId('map')
  const [left, right] = ranges?.x ?? layout.xaxis.range, [low, high] = ranges?.y ?? layout.yaxis.range
  return (x, y) => [(x - left)/(right - left)*clientWidth, (high - y)/(high - low)*clientHeight]
}

// The name of each group in its middle, the largest first, and none over another
function namePlaces(place) {
  const {x, y} = method(), {groups, codes} = colour(), members = groups.map(() => []), placed = []
  codes.forEach((g, i) => { if (x[i] !== null) members[g].push(i) })
  const order = groups.map((_, g) => g).filter(g => members[g].length)
  for (const g of order.sort((a, b) => members[b].length - members[a].length)) {
    const at = place(middle(members[g].map(i => x[i])), middle(members[g].map(i => y[i])))
    const name = {text: groups[g].short, at}, half = 3.5*name.text.length + 4, right = byId('map').clientWidth - half
    if (at[0] > 0 && at[0] < right + half) at[0] = Math.max(half, Math.min(at[0], right))  // whole, if it is on the map
    const covers = other => Math.abs(at[1] - other.at[1]) < 17
      && Math.abs(at[0] - other.at[0]) < 3.3*(name.text.length + other.text.length)
    if (!placed.some(covers)) placed.push(name)
  }
  return placed
}

function drawAbove(ranges) {
  const {x, y, near} = method(), i = state.chosen, place = screen(ranges), parts = []
  const at = j => place(x[j], y[j])
  if (byId('names').checked) {
    for (const {text, at: [left, top]} of namePlaces(place)) {
      const name = drawn('text', {x: left, y: top - 8})
      name.textContent = text
      parts.push(name)
    }
  }
  if (i !== null && x[i] !== null) {
    const [cx, cy] = at(i)
    for (const [left, top] of near[i].map(at)) {
      parts.push(drawn('line', {x1: cx, y1: cy, x2: left, y2: top}), drawn('circle', {cx: left, cy: top, r: 10}))
    }
    parts.push(drawn('circle', {cx, cy, r: 14, class: 'chosen'}))
  }
  byId('above').replaceChildren(...parts)
}

function dragged(event) {
  if (byId('map').layout.dragmode !== 'pan' || event['xaxis.range[0]'] === undefined) return
  const range = axis => [event[`${axis}axis.range[0]`], event[`${axis}axis.range[1]`]]
  drawAbove({x: range('x'), y: range('y')})
}

// ---- A model and its neighbours

function modelButton(i, number) {
  const item = element('li'), button = element('button')
  const about = data.facts.length ? fact(data.facts[0], i) : ''
  button.type = 'button'
  button.append(glyph(groupOf(i)), element('span', data.names[i]), element('span', number, 'number'))
  if (about) button.append(element('span', about, 'about'))
  button.addEventListener('click', () => { clearSearch(); choose(i); byId('chosen').focus() })
  item.append(button)
  return item
}

function showFacts(i) {
  const rows = []
  for (const column of data.facts) {
    if (fact(column, i)) rows.push(element('dt', column.label), element('dd', fact(column, i)))
  }
  byId('known').replaceChildren(...rows)
}

function showNeighbours(i) {
  const {near, similarity, label} = method(), task = data.colours[0]
  byId('nearest').hidden = false
  byId('nearest-by').textContent = near[i].length ? `Nearest by ${label}` : `${label} cannot compare this model`
  byId('neighbours').replaceChildren(...near[i].map((j, rank) => modelButton(j, similarity[i][rank].toFixed(3))))
  const same = near[i].filter(j => task.codes[j] === task.codes[i]).length
  const known = task.groups[task.codes[i]].known && near[i].length
  byId('agree').textContent = known ? `${same} of ${near[i].length} share its ${task.label}; the number is the cosine` : ''
}

function showChosen() {
  const i = state.chosen
  if (i === null) return
  byId('hint').hidden = true
  byId('chosen').textContent = data.names[i]
  showFacts(i)
  showNeighbours(i)
  const nearest = method().near[i].slice(0, 3).map(j => data.names[j]).join(', ')
  byId('said').textContent = `${data.names[i]} chosen. Nearest by ${method().label}: ${nearest || 'not known'}.`
}

function choose(i) {
  state.chosen = i
  showChosen()
  drawAbove()
}

// ---- Finding

// Models with every word in their name, then those with a word elsewhere
function matches() {
  const words = byId('search').value.toLowerCase().split(/\s+/).filter(Boolean)
  const named = i => words.every(word => data.names[i].toLowerCase().includes(word))
  const found = data.names.map((_, i) => i).filter(i => words.every(word => data.searched[i].includes(word)))
  return [...found.filter(named), ...found.filter(i => !named(i))]
}

function clearSearch() {
  if (!byId('search').value) return
  byId('search').value = ''
  showMatches()
}

function showMatches() {
  const asked = byId('search').value.trim(), found = asked ? matches() : []
  byId('found').replaceChildren(...found.slice(0, LISTED).map(i => modelButton(i)))
  const rest = found.length > LISTED ? `, the first ${LISTED} listed` : ''
  byId('count').textContent = asked ? `${count(found.length, 'model')} found${rest}` : ''
  clearTimeout(state.typing)
  state.typing = setTimeout(light, 150)
}

function searchKey(event) {
  if (event.key === 'Escape') clearSearch()
  if (event.key !== 'Enter') return
  event.preventDefault()
  byId('found').querySelector('button')?.click()
}

// The arrow keys go through a list of models, Escape leaves the list of what was found
function listKey(event) {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key]
  if (event.key === 'Escape' && byId('found').contains(event.target)) { clearSearch(); byId('search').focus() }
  if (!step) return
  const buttons = [...document.querySelectorAll(event.target.id === 'search' ? '#found button' : 'ol.models button')]
  const next = event.target.id === 'search' ? buttons[0] : buttons[buttons.indexOf(event.target) + step]
  if (!next) return
  event.preventDefault()
  next.focus()
}

// ---- Legend, tree, and the choice of method and colour

function showGroup(g) {
  state.group = state.group === g ? null : g
  for (const button of byId('legend').querySelectorAll('button')) {
    button.setAttribute('aria-pressed', button.dataset.group === String(state.group))
  }
  const name = state.group === null ? 'all models' : colour().groups[g].text
  byId('said').textContent = `The map shows ${name}.`
  return light()
}

function drawLegend() {
  state.group = null
  byId('legend-title').textContent = `Colour and shape: ${colour().label}`
  byId('legend').replaceChildren(...colour().groups.map((group, g) => {
    const item = element('li'), button = element('button')
    button.type = 'button'
    button.dataset.group = g
    button.setAttribute('aria-pressed', 'false')
    button.append(glyph(group), element('span', group.text), element('span', group.models, 'number'))
    button.addEventListener('click', () => showGroup(g))
    item.append(button)
    return item
  }))
}

async function drawTree() {
  byId('tree-section').hidden = !method().tree
  if (!method().tree) return
  const {data: traces, layout} = structuredClone(method().tree)
  traces[0].line.color = inkOf('--soft')
  byId('tree-how').textContent = data.tree_how
  await Plotly.react('tree', traces, themed(layout), {displayModeBar: false, responsive: true})
}

async function showLeaf(event) {
  if (state.colour !== 0) byId('colours').querySelector('input').click()
  await showGroup(event.points[0].customdata)
}

function radios(field, entries, change) {
  entries.forEach((entry, number) => {
    const label = element('label'), input = element('input')
    Object.assign(input, {type: 'radio', name: field, checked: number === 0})
    input.addEventListener('change', () => change(number))
    label.append(input, ` ${entry.label}`)
    byId(field).append(label)
  })
  byId(field).hidden = entries.length < 2
}

function changeMethod(number) {
  state.method = number
  showChosen()
  return Promise.all([drawMap(), drawTree()])
}

function changeColour(number) {
  state.colour = number
  drawLegend()
  showChosen()
  return drawMap()
}

function searchedText(name, i) { return [name, ...data.facts.map(column => fact(column, i))].join(' ').toLowerCase() }

async function start() {
  data.searched = data.names.map(searchedText)
  data.hover = data.names.map(hoverText)
  byId('names').checked = data.colours[0].groups.length <= 25 && innerWidth > 832
  radios('methods', data.methods, changeMethod)
  radios('colours', data.colours, changeColour)
  byId('names').addEventListener('change', () => drawAbove())
  byId('search').addEventListener('input', showMatches)
  byId('search').addEventListener('keydown', searchKey)
  byId('controls').addEventListener('submit', event => event.preventDefault())
  document.addEventListener('keydown', listKey)
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => Promise.all([drawMap(), drawTree()]))
  drawLegend()
  await Promise.all([drawMap(), drawTree()])
  byId('map').on('plotly_click', event => {
    choose(event.points[0].pointIndex)
    Plotly.Fx.unhover(byId('map'))  // what is known stands in the panel now, and would hide the neighbours here
  })
  byId('map').on('plotly_afterplot', () => drawAbove())
  byId('map').on('plotly_relayouting', dragged)
  byId('map').on('plotly_hover', () => byId('above').classList.add('hovered'))  // names make room for what is known
  byId('map').on('plotly_unhover', () => byId('above').classList.remove('hovered'))
  byId('tree').on?.('plotly_click', showLeaf)
  drawAbove()
  document.body.dataset.ready = 'yes'
}
start()
