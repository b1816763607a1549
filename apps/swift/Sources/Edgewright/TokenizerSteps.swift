/// What becomes of a match where a text is cut.
enum Behavior: String {
  case removed = "Removed"
  case isolated = "Isolated"
  case contiguous = "Contiguous"
  case mergedWithPrevious = "MergedWithPrevious"
  case mergedWithNext = "MergedWithNext"

  /// Spans that cover a text, joined and cut.
  func cut(_ text: Chars, _ spans: [Span]) -> [Chars] {
    var kept: [Span] = []
    for span in spans where span.begin < span.end {
      guard let last = kept.last else {
        if self != .removed || !span.match { kept.append(span) }
        continue
      }
      switch self {
      case .removed:
        if !span.match { kept.append(span) }
      case .contiguous where last.match == span.match:
        kept[kept.count - 1].end = span.end
      case .mergedWithPrevious where span.match && !last.match:
        kept[kept.count - 1] = Span(begin: last.begin, end: span.end, match: true)
      case .mergedWithNext where !span.match && last.match:
        kept[kept.count - 1] = Span(begin: last.begin, end: span.end, match: false)
      default:
        kept.append(span)
      }
    }
    return kept.map { Array(text[$0.begin..<$0.end]) }
  }
}

/// Each character of one kind is a match of its own.
private func spans(_ text: Chars, where test: (UInt32) -> Bool) -> [Span] {
  var (spans, from): ([Span], Int) = ([], 0)
  for (i, c) in text.enumerated() where test(c) {
    spans.append(Span(begin: from, end: i, match: false))
    spans.append(Span(begin: i, end: i + 1, match: true))
    from = i + 1
  }
  return spans + [Span(begin: from, end: text.count, match: false)]
}

private func spans(_ text: Chars, of wanted: Chars) -> [Span] {
  var (spans, from): ([Span], Int) = ([], 0)
  while let at = find(wanted, in: text, from: from) {
    spans.append(Span(begin: from, end: at, match: false))
    spans.append(Span(begin: at, end: at + wanted.count, match: true))
    from = at + wanted.count
  }
  return spans + [Span(begin: from, end: text.count, match: false)]
}

/// Bytes as the printable characters that byte-level vocabularies write them as.
enum ByteCharacters {
  static let ofByte: [UInt32] = {
    var next: UInt32 = 256
    return (UInt32(0)..<256).map { (byte: UInt32) -> UInt32 in
      if (33...126).contains(byte) || (161...172).contains(byte) || byte >= 174 { return byte }
      defer { next += 1 }
      return next
    }
  }()

  static let bytes = Dictionary(uniqueKeysWithValues: ofByte.enumerated().map { ($1, UInt8($0)) })
}

enum Normalizer {
  case nfc
  case prepend(Chars)
  case replace(Chars, Chars)

  init(_ step: JSON) throws {
    switch step["type"]?.text ?? "" {
    case "NFC": self = .nfc
    case "Prepend": self = .prepend(try part(step, "prepend"))
    case "Replace" where step["pattern"]?["String"] != nil:
      self = .replace(step["pattern"]?["String"]?.chars ?? [], try part(step, "content"))
    case let kind: throw unknown("the normalizer \(kind)")
    }
  }

  func apply(_ text: Chars) -> Chars {
    switch self {
    case .nfc: NFC.normalize(text)
    case .prepend(let mark): text.isEmpty ? text : mark + text
    case .replace(let from, let to): replacingAll(from, by: to, in: text)
    }
  }
}

enum Splitter {
  case whitespace
  case punctuation(Behavior)
  case digits(individual: Bool)
  case metaspace(mark: Chars, always: Bool, first: Bool, cuts: Bool)
  case byteLevel(space: Bool, cuts: Bool)
  case pattern(Pattern, Behavior, inverted: Bool)
  case text(Chars, Behavior, inverted: Bool)

  init(_ step: JSON) throws {
    switch step["type"]?.text ?? "" {
    case "WhitespaceSplit": self = .whitespace
    case "Punctuation": self = .punctuation(try Splitter.behavior(step, else: "Isolated"))
    case "Digits": self = .digits(individual: step["individual_digits"]?.flag ?? false)
    case "Metaspace":
      let scheme = step["prepend_scheme"]?.text ?? "always"
      self = .metaspace(
        mark: try part(step, "replacement"), always: scheme == "always", first: scheme == "first",
        cuts: step["split"]?.flag ?? true)
    case "ByteLevel":
      self = .byteLevel(space: step["add_prefix_space"]?.flag ?? true, cuts: step["use_regex"]?.flag ?? true)
    case "Split":
      let behavior = try Splitter.behavior(step, else: "")
      let inverted = step["invert"]?.flag ?? false
      if let expression = step["pattern"]?["Regex"]?.chars {
        self = .pattern(try Pattern(expression), behavior, inverted: inverted)
      } else if let wanted = step["pattern"]?["String"]?.chars {
        self = .text(wanted, behavior, inverted: inverted)
      } else {
        throw unknown("a Split without a pattern")
      }
    case let kind: throw unknown("the pre-tokenizer \(kind)")
    }
  }

  private static func behavior(_ step: JSON, else otherwise: String) throws -> Behavior {
    let name = step["behavior"]?.text ?? otherwise
    guard let behavior = Behavior(rawValue: name) else { throw unknown("the behavior \(name)") }
    return behavior
  }

  /// first: whether the text is the very first.
  func split(_ text: Chars, first: Bool) -> [Chars] {
    if text.isEmpty { return [] }
    switch self {
    case .whitespace: return Behavior.removed.cut(text, spans(text, where: isSpace))
    case .punctuation(let behavior): return behavior.cut(text, spans(text, where: isPunctuation))
    case .digits(let individual):
      return (individual ? Behavior.isolated : .contiguous).cut(text, spans(text, where: Category.number.holds))
    case .metaspace(let mark, let always, let atFirst, let cuts):
      var marked = replacingAll([0x20], by: mark, in: text)
      if always || (atFirst && first), !marked.starts(with: mark) { marked = mark + marked }
      return cuts ? Behavior.mergedWithNext.cut(marked, spans(marked) { $0 == mark.first }) : [marked]
    case .byteLevel(let space, let cuts):
      let whole = space && text.first != 0x20 ? [0x20] + text : text
      let parts = cuts ? Behavior.isolated.cut(whole, Pattern.gpt2.spans(whole)) : [whole]
      return parts.map { utf8($0).map { ByteCharacters.ofByte[Int($0)] } }
    case .pattern(let pattern, let behavior, let inverted):
      return behavior.cut(text, Splitter.turned(pattern.spans(text), inverted))
    case .text(let wanted, let behavior, let inverted):
      return behavior.cut(text, Splitter.turned(spans(text, of: wanted), inverted))
    }
  }

  private static func turned(_ spans: [Span], _ inverted: Bool) -> [Span] {
    inverted ? spans.map { Span(begin: $0.begin, end: $0.end, match: !$0.match) } : spans
  }
}

enum DecoderStep {
  case metaspace(mark: Chars, drops: Bool)
  case byteLevel
  case byteFallback
  case replace(Chars, Chars)
  case fuse
  case strip(UInt32, start: Int, stop: Int)

  init(_ step: JSON) throws {
    switch step["type"]?.text ?? "" {
    case "Metaspace":
      self = .metaspace(mark: try part(step, "replacement"), drops: step["prepend_scheme"]?.text != "never")
    case "ByteLevel": self = .byteLevel
    case "ByteFallback": self = .byteFallback
    case "Replace" where step["pattern"]?["String"] != nil:
      self = .replace(step["pattern"]?["String"]?.chars ?? [], try part(step, "content"))
    case "Fuse": self = .fuse
    case "Strip":
      guard let mark = try part(step, "content").first else { throw unknown("a Strip of nothing") }
      self = .strip(mark, start: step["start"]?.int ?? 0, stop: step["stop"]?.int ?? 0)
    case let kind: throw unknown("the decoder \(kind)")
    }
  }

  func apply(_ parts: [Chars]) -> [Chars] {
    switch self {
    case .metaspace(let mark, let drops):
      return parts.enumerated().map { replacingAll(mark, by: $0 == 0 && drops ? [] : [0x20], in: $1) }
    case .byteLevel:
      return [chars(utf8: parts.flatMap(DecoderStep.bytes)).text]
    case .byteFallback:
      return DecoderStep.joiningBytes(parts)
    case .replace(let from, let to):
      return parts.map { replacingAll(from, by: to, in: $0) }
    case .fuse:
      return [Chars(parts.joined())]
    case .strip(let mark, let start, let stop):
      return parts.map { part in
        var part = part[...]
        for _ in 0..<max(0, start) where part.first == mark { part = part.dropFirst() }
        for _ in 0..<max(0, stop) where part.last == mark { part = part.dropLast() }
        return Array(part)
      }
    }
  }

  /// A byte-level token as bytes; one that is not written so stands for itself.
  private static func bytes(_ part: Chars) -> [UInt8] {
    let bytes = part.compactMap { ByteCharacters.bytes[$0] }
    return bytes.count == part.count ? bytes : utf8(part)
  }

  /// Runs of <0x..> tokens as the text of their bytes; one U+FFFD a token where that is no UTF-8.
  private static func joiningBytes(_ parts: [Chars]) -> [Chars] {
    var (out, run): ([Chars], [UInt8]) = ([], [])
    func flush() {
      let (text, whole) = chars(utf8: run)
      if whole, !run.isEmpty { out.append(text) }
      if !whole { out += run.map { _ in [replacement] } }
      run = []
    }
    for part in parts {
      if let byte = ByteName.byte(part) {
        run.append(byte)
      } else {
        flush()
        out.append(part)
      }
    }
    flush()
    return out
  }
}

/// The tokens <0x00> to <0xFF>.
enum ByteName {
  static func name(_ byte: UInt8) -> Chars {
    let digits = Array("0123456789ABCDEF".unicodeScalars)
    return chars("<0x") + [digits[Int(byte >> 4)].value, digits[Int(byte & 15)].value, 0x3E]
  }

  static func byte(_ part: Chars) -> UInt8? {
    guard part.count == 6, part.starts(with: chars("<0x")), part.last == 0x3E else { return nil }
    return UInt8(string(part[3..<5]), radix: 16)
  }
}

private func part(_ step: JSON, _ key: String) throws -> Chars {
  guard let text = step[key]?.chars else { throw unknown("a step without \(key)") }
  return text
}

func unknown(_ what: String) -> EdgewrightError {
  EdgewrightError("tokenizer.json has \(what), which this client does not know; embed the bundle again with this version")
}
