import Foundation

public typealias Token = Int

/// A size of a shape: a number, or a name that stands for one.
public enum Size: Decodable, Equatable, Sendable {
  case fixed(Int)
  case named(String)

  public init(from decoder: any Decoder) throws {
    let value = try decoder.singleValueContainer()
    if let number = try? value.decode(Int.self) {
      self = .fixed(number)
    } else {
      self = .named(try value.decode(String.self))
    }
  }
}

/// An input or an output of a graph, or a state: what goes in as `name` and, where it is `updated`, comes out as `name_out`.
public struct GraphPort: Decodable, Sendable {
  public let name: String
  public let dtype: ElementType
  public let shape: [Size]
  public let kind: String?
  public let updated: Bool?

  /// The shape for one stream of `capacity` positions.
  public func sized(_ capacity: Int) -> [Int] {
    shape.map { size in
      switch size {
      case .fixed(let number): number
      case .named(let name): name == "batch" ? 1 : capacity
      }
    }
  }
}

public struct Graph: Decodable, Sendable {
  public let name: String
  public let file: String
  public let inputs: [GraphPort]
  public let outputs: [GraphPort]
  public let states: [GraphPort]
  public let onnxruntime: String

  public func reads(_ input: String) -> Bool {
    inputs.contains { $0.name == input }
  }
}

/// The bytes and the SHA-256 of a file.
public struct FileFact: Decodable, Equatable, Sendable {
  public let sha256: String
  public let bytes: Int
}

/// How a decoder-decoder turns a context into rows of memory.
public struct ContextFacts: Decodable, Sendable {
  public let window: Int
  public let hidden: Int
  public let rows: Int
  public let vocab: Int
  public let tokens: [Token]
  public let prefix: [Token]
  public let splice: String
}

/// How a token is drawn. temperature 0: the best one.
public struct Sampling: Decodable, Equatable, Sendable {
  public var temperature: Double
  public var topP: Double
  public var topK: Int
  public var minP: Double
  public var repetitionPenalty: Double
  public var noRepeatNgram: Int
  public var seed: UInt64 = 0

  public static let greedy = Sampling()

  public init(temperature: Double = 0, topP: Double = 1, topK: Int = 0, seed: UInt64 = 0) {
    self.temperature = temperature
    self.topP = topP
    self.topK = topK
    self.minP = 0
    self.repetitionPenalty = 1
    self.noRepeatNgram = 0
    self.seed = seed
  }

  enum CodingKeys: String, CodingKey {
    case temperature, topP, topK, minP, repetitionPenalty, noRepeatNgram
  }
}

/// `app.json`: the contract of the folder that it lies in.
public struct AppContract: Decodable, Sendable {
  public struct Stops: Decodable, Sendable {
    public let tokens: [Token]
    public let strings: [String]
  }
  public struct TokenizerFacts: Decodable, Sendable {
    public let file: String
    public let before: [Token]
    public let after: [Token]
    public let bos: Token?
  }
  public struct Chat: Decodable, Sendable {
    public let template: String
    public let before: String?
    public let after: String?
    public let trims: Bool
  }
  public struct MemoryFacts: Decodable, Sendable {
    public let weights: Int
    public let states: Int
    public let total: Int
  }
  /// A Core ML package beside the graphs: its folder, its functions and its files.
  public struct CoreML: Decodable, Sendable {
    public let package: String
    public let functions: [String]
    public let files: [String: FileFact]
  }

  public let schemaVersion: Int
  public let name: String
  public let task: String
  public let graphs: [Graph]
  public let decoderStart: Token?
  public let forced: [Token]
  public let vocab: Int
  public let maxContext: Int
  public let maxNewTokens: Int
  public let prefillChunk: Int
  public let context: ContextFacts?
  public let sampling: Sampling
  public let stops: Stops
  public let tokenizer: TokenizerFacts?
  public let chat: Chat?
  public let memory: MemoryFacts
  public let fingerprint: String
  public let files: [String: FileFact]
  public let coreml: CoreML?

  /// Reads the contract of a folder.
  public static func read(_ folder: URL) throws -> AppContract {
    let file = folder.appendingPathComponent("app.json")
    let app: AppContract
    do {
      let decoder = JSONDecoder()
      decoder.keyDecodingStrategy = .convertFromSnakeCase
      app = try decoder.decode(AppContract.self, from: try Files.read(file))
    } catch is DecodingError {
      throw EdgewrightError("\(file.path) is not as it was written; copy the folder again")
    }
    guard app.schemaVersion == 1 else {
      throw EdgewrightError("\(file.path) is of another version; embed the bundle again, or build this client anew")
    }
    guard app.prefillChunk > 0, app.vocab > 0, app.maxContext > 1 else {
      throw EdgewrightError("\(file.path) has sizes that mean nothing; embed the bundle again")
    }
    return app
  }

  public func graph(_ name: String) throws -> Graph {
    guard let found = graphs.first(where: { $0.name == name }) else {
      throw EdgewrightError("app.json has no graph \(name); embed the bundle again")
    }
    return found
  }
}
