#if canImport(SwiftUI)
  import Edgewright
  import SwiftUI

  /// A prompt, its answer as it comes, and a button that stops it.
  public struct ContentView: View {
    private let folder: URL
    private let runtime: any Runtime
    private let options: LoadOptions
    private let readsContext: Bool
    @State private var conversation = Conversation()
    @State private var prompt: String
    @State private var context = ""

    /// readsContext: for a decoder-decoder, which reads a text before its questions.
    public init(
      folder: URL, runtime: any Runtime, options: LoadOptions = LoadOptions(), prompt: String = "", readsContext: Bool = false
    ) {
      (self.folder, self.runtime, self.options, self.readsContext) = (folder, runtime, options, readsContext)
      _prompt = State(initialValue: prompt)
    }

    public var body: some View {
      VStack(alignment: .leading, spacing: 12) {
        if readsContext {
          TextEditor(text: $context).frame(minHeight: 80).accessibilityLabel("Context")
        }
        HStack {
          TextField("Prompt", text: $prompt, axis: .vertical).onSubmit(send)
          if conversation.phase == .answering {
            Button("Stop", role: .cancel) { conversation.cancel() }
          } else {
            Button("Answer", action: send).disabled(conversation.phase != .ready || prompt.isEmpty)
          }
        }
        if case .loading(let stage) = conversation.phase {
          ProgressView(stage)
        }
        if let failure = conversation.failure {
          Label(failure, systemImage: "exclamationmark.triangle").foregroundStyle(.red)
        }
        ScrollView {
          Text(conversation.answer).frame(maxWidth: .infinity, alignment: .leading).textSelection(.enabled)
        }
        Text(conversation.summary).font(.footnote).foregroundStyle(.secondary)
      }
      .padding()
      .task { await open(runtime) }
    }

    private func open(_ runtime: some Runtime) async {
      await conversation.open(folder, runtime: runtime, options: options)
    }

    private func send() {
      conversation.send(prompt, context: readsContext ? context : "")
    }
  }
#endif
