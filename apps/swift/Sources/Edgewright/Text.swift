/// Text as Unicode's scalars. Swift's own strings hold "é" and "e" with an accent equal; vocabularies do not.
typealias Chars = [UInt32]

let replacement: UInt32 = 0xFFFD

func chars(_ text: some StringProtocol) -> Chars {
  text.unicodeScalars.map(\.value)
}

func string(_ text: some Sequence<UInt32>) -> String {
  var out = String.UnicodeScalarView()
  for value in text { out.append(Unicode.Scalar(value) ?? "\u{FFFD}") }
  return String(out)
}

func utf8(_ text: some Sequence<UInt32>) -> [UInt8] {
  var out: [UInt8] = []
  for c in text {
    if c < 0x80 {
      out.append(UInt8(c))
    } else if c < 0x800 {
      out += [UInt8(0xC0 | c >> 6), UInt8(0x80 | c & 63)]
    } else if c < 0x10000 {
      out += [UInt8(0xE0 | c >> 12), UInt8(0x80 | c >> 6 & 63), UInt8(0x80 | c & 63)]
    } else {
      out += [UInt8(0xF0 | c >> 18), UInt8(0x80 | c >> 12 & 63), UInt8(0x80 | c >> 6 & 63), UInt8(0x80 | c & 63)]
    }
  }
  return out
}

/// The characters of UTF-8; each longest part that is none is one U+FFFD, as Unicode recommends. whole: whether there was none.
func chars(utf8 bytes: some Collection<UInt8>) -> (text: Chars, whole: Bool) {
  let bytes = Array(bytes)
  var (text, whole, at) = (Chars(), true, 0)
  while at < bytes.count {
    let first = bytes[at]
    at += 1
    if first < 0x80 {
      text.append(UInt32(first))
      continue
    }
    var (more, low, high, value): (Int, UInt8, UInt8, UInt32) = (0, 0x80, 0xBF, 0)
    switch first {
    case 0xC2...0xDF: (more, value) = (1, UInt32(first & 0x1F))
    case 0xE0...0xEF: (more, value) = (2, UInt32(first & 0x0F))
    case 0xF0...0xF4: (more, value) = (3, UInt32(first & 0x07))
    default: break
    }
    switch first {
    case 0xE0: low = 0xA0
    case 0xED: high = 0x9F
    case 0xF0: low = 0x90
    case 0xF4: high = 0x8F
    default: break
    }
    var good = more > 0
    for _ in 0..<more {
      guard at < bytes.count, bytes[at] >= low, bytes[at] <= high else {
        good = false
        break
      }
      value = value << 6 | UInt32(bytes[at] & 0x3F)
      at += 1
      (low, high) = (0x80, 0xBF)
    }
    text.append(good ? value : replacement)
    whole = whole && good
  }
  return (text, whole)
}

/// Where a text stands in another, from a place on.
func find(_ wanted: Chars, in text: Chars, from: Int = 0) -> Int? {
  guard let first = wanted.first, text.count >= wanted.count else { return nil }
  var at = from
  while at + wanted.count <= text.count {
    if text[at] == first, text[at..<at + wanted.count].elementsEqual(wanted) { return at }
    at += 1
  }
  return nil
}

func replacingAll(_ from: Chars, by to: Chars, in text: Chars) -> Chars {
  guard var at = find(from, in: text) else { return text }
  var (out, before) = (Chars(), 0)
  while true {
    out += text[before..<at] + to
    before = at + from.count
    guard let next = find(from, in: text, from: before) else { break }
    at = next
  }
  return out + text[before...]
}

enum Category {
  case letter, mark, number, digit, word, punctuation, space

  func holds(_ c: UInt32) -> Bool {
    switch self {
    case .letter: Category.inRanges(UnicodeTables.letters, c)
    case .mark: Category.inRanges(UnicodeTables.marks, c)
    case .number: Category.inRanges(UnicodeTables.numbers, c)
    case .digit: Category.inRanges(UnicodeTables.digits, c)
    case .punctuation: Category.inRanges(UnicodeTables.punctuation, c)
    case .word:
      Category.letter.holds(c) || Category.mark.holds(c) || Category.digit.holds(c)
        || Category.inRanges(UnicodeTables.connectors, c)
    case .space: isSpace(c)
    }
  }

  private static func inRanges(_ ranges: [UInt32], _ c: UInt32) -> Bool {
    let i = row(of: c, in: ranges, width: 2)
    return i >= 0 && c <= ranges[2 * i + 1]
  }
}

/// The last row that begins at `c` or before, of a flat table sorted by its first column; -1 where none does.
private func row(of c: UInt32, in table: [UInt32], width: Int) -> Int {
  var (low, high) = (0, table.count / width)
  while low < high {
    let middle = (low + high) / 2
    if table[middle * width] <= c { low = middle + 1 } else { high = middle }
  }
  return low - 1
}

func isSpace(_ c: UInt32) -> Bool {
  switch c {
  case 9...13, 0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000: true
  default: false
  }
}

func isPunctuation(_ c: UInt32) -> Bool {
  switch c {
  case 0x21...0x2F, 0x3A...0x40, 0x5B...0x60, 0x7B...0x7E: true
  default: Category.punctuation.holds(c)
  }
}

/// NFC: decomposed, ordered by combining class, composed (Unicode, chapter 3.11).
enum NFC {
  private static let hangul: UInt32 = 0xAC00
  private static let lead: UInt32 = 0x1100
  private static let vowel: UInt32 = 0x1161
  private static let tail: UInt32 = 0x11A7

  private static let pairs: [UInt64: UInt32] = {
    let table = UnicodeTables.decompositions
    var made: [UInt64: UInt32] = [:]
    for at in stride(from: 0, to: table.count, by: 4) where table[at + 3] == 1 {
      made[UInt64(table[at + 1]) << 32 | UInt64(table[at + 2])] = table[at]
    }
    return made
  }()

  static func normalize(_ text: Chars) -> Chars {
    if text.allSatisfy({ $0 < 0x300 }) { return text }
    var apart = Chars()
    for c in text { decompose(c, into: &apart) }
    order(&apart)
    var (out, starter, last): (Chars, Int?, UInt32) = ([], nil, 0)
    for c in apart {
      let kind = combiningClass(c)
      if let starter, starter + 1 == out.count || (last != 0 && last < kind), let whole = composed(out[starter], c) {
        out[starter] = whole
        continue
      }
      if kind == 0 { starter = out.count }
      last = kind
      out.append(c)
    }
    return out
  }

  /// Marks between two starters, by their class; those of one class stay as they were.
  private static func order(_ text: inout Chars) {
    var from = 0
    while from < text.count {
      var to = from
      while to < text.count, combiningClass(text[to]) != 0 { to += 1 }
      if to - from > 1 {
        let marks = text[from..<to].enumerated().sorted {
          (combiningClass($0.element), $0.offset) < (combiningClass($1.element), $1.offset)
        }
        text.replaceSubrange(from..<to, with: marks.map(\.element))
      }
      from = to + 1
    }
  }

  private static func combiningClass(_ c: UInt32) -> UInt32 {
    let table = UnicodeTables.combining
    let i = row(of: c, in: table, width: 3)
    return i >= 0 && c <= table[3 * i + 1] ? table[3 * i + 2] : 0
  }

  private static func decompose(_ c: UInt32, into out: inout Chars) {
    if c >= hangul, c < hangul + 11172 {
      let index = c - hangul
      out += [lead + index / 588, vowel + index % 588 / 28]
      if index % 28 != 0 { out.append(tail + index % 28) }
      return
    }
    let table = UnicodeTables.decompositions
    let i = row(of: c, in: table, width: 4)
    guard i >= 0, table[4 * i] == c else {
      out.append(c)
      return
    }
    decompose(table[4 * i + 1], into: &out)
    if table[4 * i + 2] != 0 { decompose(table[4 * i + 2], into: &out) }
  }

  private static func composed(_ a: UInt32, _ b: UInt32) -> UInt32? {
    if a >= lead, a < lead + 19, b >= vowel, b < vowel + 21 { return hangul + ((a - lead) * 21 + (b - vowel)) * 28 }
    if a >= hangul, a < hangul + 11172, (a - hangul) % 28 == 0, b > tail, b < tail + 28 { return a + (b - tail) }
    return pairs[UInt64(a) << 32 | UInt64(b)]
  }
}
