/// A part of a text: what a pattern found there, or what is between.
struct Span {
  var begin: Int
  var end: Int
  var match: Bool
}

/// Regular expressions as far as pre-tokenizers use them.
///
/// Alternatives, groups (?:…) and (?i:…), look-aheads (?=…) and (?!…), classes with \s \S \d \w \p{L} \p{N} \p{M} \p{P}, and greedy
/// ? * + {m,n}, also possessive. Matching goes back as a backtracking engine does: the first alternative that fits.
final class Pattern: Sendable {
  private let root: Node

  static let gpt2 = parsed(#"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#)

  private static func parsed(_ text: String) -> Pattern {
    do {
      return try Pattern(chars(text))
    } catch {
      preconditionFailure("\(error)")
    }
  }

  init(_ text: Chars) throws {
    var parser = PatternParser(text)
    root = try parser.whole()
  }

  /// The matches from left to right, and what is between them.
  func spans(_ text: Chars) -> [Span] {
    var (spans, from, at): ([Span], Int, Int) = ([], 0, 0)
    while at < text.count {
      var end = at
      let found = root.match(text, at) { to in
        end = to
        return true
      }
      guard found, end > at else {
        at += 1
        continue
      }
      spans.append(Span(begin: from, end: at, match: false))
      spans.append(Span(begin: at, end: end, match: true))
      from = end
      at = end
    }
    spans.append(Span(begin: from, end: text.count, match: false))
    return spans
  }
}

indirect enum Node: Sendable {
  case oneOf([Member], negated: Bool, fold: Bool)
  case sequence([Node])
  case choice([Node])
  case again(Node, least: Int, most: Int, possessive: Bool)
  case ahead(Node, negated: Bool)

  /// Of a class: a range, or a category.
  enum Member: Sendable {
    case range(UInt32, UInt32)
    case category(Category, negated: Bool)

    func holds(_ c: UInt32) -> Bool {
      switch self {
      case .range(let first, let last): c >= first && c <= last
      case .category(let category, let negated): category.holds(c) != negated
      }
    }
  }

  private static let mostGroups = 1000

  func match(_ text: Chars, _ at: Int, _ then: (Int) -> Bool) -> Bool {
    switch self {
    case .oneOf:
      return at < text.count && fits(text[at]) && then(at + 1)
    case .sequence(let parts):
      return Node.inTurn(parts[...], text, at, then)
    case .choice(let parts):
      return parts.contains { $0.match(text, at, then) }
    case .ahead(let inner, let negated):
      return inner.match(text, at) { _ in true } != negated && then(at)
    case .again(let inner, let least, let most, let possessive):
      guard case .oneOf = inner else { return groupAgain(inner, least, most, text, at, 0, then) }
      var count = 0  // classes are counted in a loop, so that a long run takes no stack
      while count < most, at + count < text.count, inner.fits(text[at + count]) { count += 1 }
      if count < least { return false }
      if possessive { return then(at + count) }
      return (least...count).reversed().contains { then(at + $0) }
    }
  }

  private func fits(_ c: UInt32) -> Bool {
    guard case .oneOf(let members, let negated, let fold) = self else { return false }
    func plain(_ one: UInt32) -> Bool { members.contains { $0.holds(one) } }
    var found = plain(c)
    if !found, fold {
      switch c {
      case 0x61...0x7A: found = plain(c - 32)
      case 0x41...0x5A: found = plain(c + 32)
      case 0x17F: found = plain(0x73) || plain(0x53)
      case 0x212A: found = plain(0x6B) || plain(0x4B)
      default: break
      }
    }
    return found != negated
  }

  private static func inTurn(_ parts: ArraySlice<Node>, _ text: Chars, _ at: Int, _ then: (Int) -> Bool) -> Bool {
    guard let first = parts.first else { return then(at) }
    return first.match(text, at) { inTurn(parts.dropFirst(), text, $0, then) }
  }

  private func groupAgain(
    _ inner: Node, _ least: Int, _ most: Int, _ text: Chars, _ at: Int, _ count: Int, _ then: (Int) -> Bool
  ) -> Bool {
    if count < min(most, Node.mostGroups) {
      let more = inner.match(text, at) { $0 != at && groupAgain(inner, least, most, text, $0, count + 1, then) }
      if more { return true }
    }
    return count >= least && then(at)
  }
}

private struct PatternParser {
  private let text: Chars
  private var at = 0

  init(_ text: Chars) {
    self.text = text
  }

  mutating func whole() throws -> Node {
    let root = try alternatives(false)
    if at != text.count { throw refusal }
    return root
  }

  private var refusal: EdgewrightError {
    EdgewrightError(
      "tokenizer.json: this client does not know the regular expression \(string(text)); embed the bundle again")
  }

  private var next: Character? {
    at < text.count ? Unicode.Scalar(text[at]).map(Character.init) : nil
  }

  private mutating func take(_ wanted: String) -> Bool {
    let wanted = chars(wanted)
    guard at + wanted.count <= text.count, text[at..<at + wanted.count].elementsEqual(wanted) else { return false }
    at += wanted.count
    return true
  }

  private mutating func alternatives(_ fold: Bool) throws -> Node {
    var choices: [Node] = []
    repeat {
      var parts: [Node] = []
      while let c = next, c != "|", c != ")" { parts.append(try repeated(fold)) }
      choices.append(.sequence(parts))
    } while take("|")
    return .choice(choices)
  }

  private mutating func repeated(_ fold: Bool) throws -> Node {
    let inner = try atom(fold)
    var (least, most) = (1, Int.max)
    if take("?") {
      (least, most) = (0, 1)
    } else if take("*") {
      least = 0
    } else if take("{") {
      least = try number()
      most = least
      if take(",") { most = try next == "}" ? Int.max : number() }
      if !take("}") || most < least { throw refusal }
    } else if !take("+") {
      return inner
    }
    let possessive = take("+")
    if take("?") { throw refusal }  // lazy
    return .again(inner, least: least, most: most, possessive: possessive)
  }

  private mutating func number() throws -> Int {
    var value: Int?
    while let c = next, let digit = c.isASCII ? c.wholeNumberValue : nil, value ?? 0 < 1000 {
      value = 10 * (value ?? 0) + digit
      at += 1
    }
    guard let value else { throw refusal }
    return value
  }

  private mutating func atom(_ fold: Bool) throws -> Node {
    for (opening, negated) in [("(?!", true), ("(?=", false)] where take(opening) {
      let inner = try alternatives(fold)
      if !take(")") { throw refusal }
      return .ahead(inner, negated: negated)
    }
    let insensitive = take("(?i:")
    if insensitive || take("(?:") || take("(") {
      if next == "?" { throw refusal }
      let inner = try alternatives(fold || insensitive)
      if !take(")") { throw refusal }
      return inner
    }
    if take("[") {
      let negated = take("^")
      var members: [Node.Member] = []
      while let c = next, c != "]" { members.append(try ranged()) }
      if !take("]") { throw refusal }
      return .oneOf(members, negated: negated, fold: fold)
    }
    if let c = next, "^$.".contains(c) { throw refusal }
    return .oneOf([try member()], negated: false, fold: fold)
  }

  private mutating func ranged() throws -> Node.Member {
    let first = try member()
    guard case .range(let from, _) = first, at + 1 < text.count, next == "-", text[at + 1] != 0x5D else { return first }
    at += 1
    guard case .range(let to, _) = try member() else { throw refusal }
    return .range(from, to)
  }

  private mutating func member() throws -> Node.Member {
    guard at < text.count else { throw refusal }
    if !take("\\") {
      at += 1
      return .range(text[at - 1], text[at - 1])
    }
    guard let c = next else { throw refusal }
    at += 1
    switch c {
    case "r": return .range(0x0D, 0x0D)
    case "n": return .range(0x0A, 0x0A)
    case "t": return .range(0x09, 0x09)
    case "s", "S": return .category(.space, negated: c == "S")
    case "d", "D": return .category(.digit, negated: c == "D")
    case "w", "W": return .category(.word, negated: c == "W")
    case "p", "P":
      let categories: [(String, Category)] = [
        ("{L}", .letter), ("{N}", .number), ("{M}", .mark), ("{P}", .punctuation),
      ]
      for (name, category) in categories where take(name) { return .category(category, negated: c == "P") }
      throw refusal
    default:
      let value = text[at - 1]
      if Category.letter.holds(value) || Category.number.holds(value) { throw refusal }
      return .range(value, value)
    }
  }
}
